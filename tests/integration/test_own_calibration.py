"""Own calibration of a recipe: made in the workspace before the weights, on no evaluated text."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from glm_quant.build import Build, BuildSpec
from glm_quant.calibration.build_calibration import CalibrationRecord, imatrix_folder, record_path
from glm_quant.calibration.texts import calibration_texts
from glm_quant.convert import open_conversion
from glm_quant.data import held_out_text, items_path, tiny_glm_path
from glm_quant.errors import IntegrityError, RecipeError, RunError
from glm_quant.evaluation.divergence import reference_batch
from glm_quant.evaluation.token_set import make_token_set, read_texts
from glm_quant.fit.text import fit_texts
from glm_quant.quantize.verify import verify
from glm_quant.recipe import load_recipe, parse_recipe
from glm_quant.settings import CalibrationSettings, DivergenceSettings
from glm_quant.stages.calibrate import CalibrateStage
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.streaming.forward import stream_batches
from glm_quant.streaming.weights import SourceWeights
from glm_quant.workspace import workspace_beside
from tests.plain import PLAIN

RECIPE = Path(PLAIN).read_text().replace("quantizer: search", "quantizer: gptq")
SMALL = "calibration: {tokens: 64, context: 64}\n"


def write(folder: Path, more: str = SMALL, text: str = RECIPE) -> str:
    """Write a recipe; returns its path."""
    path = folder / "mine.yaml"
    path.write_text(text + more)
    return str(path)


def source() -> list[str]:
    """The options that name the small checkpoint."""
    return ["--source", str(tiny_glm_path())]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished output of `convert`, calibrated by itself."""
    folder = tmp_path_factory.mktemp("own")
    output = folder / "build"
    done = CliRunner().invoke(
        app,
        ["convert", *source(), "--recipe", write(folder), "--output", str(output)],
    )
    assert done.exit_code == 0, done.stderr
    return output


def test_convert_calibrates_first(converted: Path) -> None:
    """`convert` makes what `gptq` needs beside the output; with it, each block can be made anew."""
    workspace = workspace_beside(converted)
    record = CalibrationRecord.load(record_path(workspace))
    assert record is not None
    assert record.slices == dict.fromkeys(calibration_texts(CalibrationSettings()), 64)
    assert (record.tokens, record.factors > 0) == (320, True)
    assert record.experts >= record.thin >= record.unseen
    folder = imatrix_folder(workspace)
    again = verify(converted, tiny_glm_path(), samples=40, imatrix=folder)
    assert (again.rederived_blocks, again.calibrated) == (40, 0)
    without = verify(converted, tiny_glm_path(), samples=1 << 20)
    assert 0 < without.rederived_blocks < without.calibrated


def test_another_imatrix_is_told(converted: Path, tmp_path: Path) -> None:
    """`verify` with a calibration that the output was not made with says so before it compares."""
    output = tmp_path / "other"
    recipe = write(tmp_path, "calibration: {tokens: 32, context: 32}\n")
    options = [*source(), "--recipe", recipe, "--output", str(output)]
    assert CliRunner().invoke(app, ["convert", *options]).exit_code == 0
    other = imatrix_folder(workspace_beside(output))
    with pytest.raises(IntegrityError, match="made with another imatrix: 0 of its"):
        verify(converted, tiny_glm_path(), imatrix=other)


def test_again_nothing_is_made(converted: Path) -> None:
    """The same command again streams nothing; a change of the texts calibrates again."""
    recipe = str(converted.with_name("mine.yaml"))
    output = str(converted)
    before = record_path(workspace_beside(converted)).stat().st_mtime_ns
    options = [*source(), "--recipe", recipe, "--output", output]
    assert CliRunner().invoke(app, ["convert", *options]).exit_code == 0
    assert record_path(workspace_beside(converted)).stat().st_mtime_ns == before


def test_stages_of_a_run(tmp_path: Path) -> None:
    """Planned without it, then calibrated, then planned with it in the same bytes, once for all."""
    spec = BuildSpec(
        recipe=write(tmp_path), source=str(tiny_glm_path()), workspace=str(tmp_path / "work")
    )
    build = Build(spec)
    build.workspace.create()
    PlanStage(build).run(lambda _done, _total: None)
    sizes = [shard.size_bytes for shard in build.plan.shards]
    assert build.plan.uncalibrated
    with pytest.raises(RunError, match="the recipe wants a calibration, and it was not made"):
        QuantizeStage(build, 0).run(lambda _done, _total: None)
    layers: list[int] = []
    made = CalibrateStage(build).run(lambda done, _total: layers.append(done))
    assert "320 tokens" in made.summary
    assert layers == list(range(1, len(layers) + 1))
    assert not build.plan.uncalibrated
    assert [shard.size_bytes for shard in build.plan.shards] == sizes
    again = Build(spec)
    for stage in (PlanStage, CalibrateStage):
        assert stage(again).current() is not None, stage
    for change, still in (("seed: 1", False), ("memory_gb: 8", True)):
        recipe = write(tmp_path, SMALL.replace("}", f", {change}}}"))
        other = Build(spec.model_copy(update={"recipe": recipe}))
        assert (CalibrateStage(other).current() is not None) == still
        assert other.plan.uncalibrated != still
        assert PlanStage(other).current() is not None


def test_one_walk_serves_the_divergence_too(converted: Path, tmp_path: Path) -> None:
    """A run's calibration leaves the source's states, to the byte those of a pass of their own.

    What was calibrated has the bytes of a calibration that walks alone.
    """
    more = SMALL + "divergence: {tokens: 96, context: 96}\n"
    spec = BuildSpec(
        recipe=write(tmp_path, more), source=str(tiny_glm_path()), workspace=str(tmp_path / "work")
    )
    build = Build(spec)
    build.workspace.create()
    CalibrateStage(build).run(lambda _done, _total: None)
    alone = imatrix_folder(workspace_beside(converted))
    for path in alone.iterdir():
        assert (imatrix_folder(build.workspace) / path.name).read_bytes() == path.read_bytes()
    settings = build.recipe.divergence
    tokens = make_token_set(build.checkpoint, settings)
    with reference_batch(build.checkpoint, tokens, build.workspace.divergence, 1 << 32) as batch:
        assert batch is None  # it stands
    with reference_batch(build.checkpoint, tokens, tmp_path, 1 << 32) as batch:
        assert batch is not None
        stream_batches(SourceWeights(build.checkpoint), [batch])
    (made,) = build.workspace.divergence.glob("reference-*")
    names = {path.name for path in made.glob("sequence-*")}
    assert names == {f"sequence-{i:04d}.safetensors" for i in range(len(tokens.sequences))}
    for name in names:
        assert (made / name).read_bytes() == (tmp_path / made.name / name).read_bytes()


def test_planning_asks_for_nothing(tmp_path: Path) -> None:
    """`plan` of a recipe with `gptq` needs no calibration and makes none; sizes are as without."""
    planned: list[dict[str, object]] = []
    for text in (RECIPE + SMALL, Path(PLAIN).read_text()):
        options = [*source(), "--recipe", write(tmp_path, "", text)]
        done = CliRunner().invoke(app, ["plan", *options, "--json"])
        planned.append(json.loads(done.stdout))
    assert planned[0]["calibrates"] is True
    assert planned[1]["calibrates"] is False
    assert planned[0]["shards"] == planned[1]["shards"]


def test_search_calibrates_where_it_is_told_to(tmp_path: Path) -> None:
    """`search` has importance where `calibration` is given, and none where it is not."""
    plain = Path(PLAIN).read_text()
    assert load_recipe(PLAIN).own_calibration is None
    recipe = parse_recipe(plain + SMALL, "r.yaml")
    assert recipe.own_calibration == CalibrationSettings(tokens=64, context=64)
    assert not recipe.wants_factors
    assert parse_recipe(RECIPE, "r.yaml").own_calibration == CalibrationSettings()
    assert parse_recipe(RECIPE + "imatrix: there\n", "r.yaml").own_calibration is None
    for text, message in (
        (RECIPE + SMALL + "imatrix: there\n", "or `calibration` to make one, but not both"),
        (plain.replace("search", "minmax") + SMALL, "calibration is given, but no rule"),
    ):
        with pytest.raises(RecipeError, match=message):
            parse_recipe(text, "r.yaml")
    opened = open_conversion(tiny_glm_path(), write(tmp_path), tmp_path / "build")
    assert opened.conversion.plan.uncalibrated


def sentences(text: str) -> set[str]:
    """Lines of more than a few words, without what surrounds them."""
    return {line.strip(' \\n",') for line in text.splitlines() if len(line.strip()) >= 30}


def test_built_in_texts_are_apart() -> None:
    """No line of 30 characters is in both an evaluated text and one that a build is fitted to.

    The latter are calibration's built-in texts and what `fit` measures on, which are apart too.
    """
    evaluated = {**read_texts(DivergenceSettings()), "held out": held_out_text()}
    evaluated |= {path.name: path.read_text() for path in items_path("").glob("*.jsonl")}
    calibrated = dict(calibration_texts(CalibrationSettings()))
    (measured,) = fit_texts(None).values()
    assert not any(sentences(measured) & sentences(text) for text in calibrated.values())
    for name, text in {**calibrated, "fit": measured}.items():
        assert len(sentences(text)) > 4
        for other, theirs in evaluated.items():
            assert not sentences(text) & sentences(theirs), (name, other)


@pytest.mark.parametrize("place", ["divergence: {{texts: {{a: {0}}}}}", "evaluation: {{{1}: {0}}}"])
def test_evaluated_text_is_refused(place: str, tmp_path: Path) -> None:
    """A file that is also evaluated stops the run before anything is streamed, and is named."""
    text = tmp_path / "text.txt"
    text.write_text(held_out_text()[:4000])
    more = f"calibration: {{texts: {{mine: {text}}}, tokens: 64, context: 64}}\n"
    more += place.format(text, "perplexity_text") + "\n"
    spec = BuildSpec(
        recipe=write(tmp_path, more), source=str(tiny_glm_path()), workspace=str(tmp_path / "work")
    )
    build = Build(spec)
    build.workspace.create()
    with pytest.raises(RecipeError, match=r"calibration\.texts\.mine is the same text as"):
        CalibrateStage(build).run(lambda _done, _total: None)
