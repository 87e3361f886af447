"""`glm-quant card`: the card of a finished build, rendered again from its workspace alone."""

import json
import re
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest
from jinja2 import Environment

from glm_quant.artifact import FileDigest, Record
from glm_quant.build import Build, BuildSpec
from glm_quant.checkpoint.manifest import load_manifest
from glm_quant.errors import BusyError, CardError, IntegrityError
from glm_quant.stages.assemble import AssembleStage, BuildRecord
from glm_quant.stages.base import Stage
from glm_quant.stages.card import CardStage, render_again
from glm_quant.stages.divergence import DivergenceStage
from glm_quant.stages.download import DownloadStage
from glm_quant.stages.evaluate import EvaluationStage
from glm_quant.stages.parity import ParityStage, ParityStageRecord
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.publish import PublishStage
from glm_quant.stages.quantize import QuantizeStage
from tests.card_numbers import CONSTANTS, numbers, unexplained
from tests.card_records import EPYC, PARITY, rich_divergence, rich_evaluation
from tests.conftest import run_command

RECIPE = """\
name: again
description: Everything but the MTP layer as it is stored
rules:
  - match: "^(?!model.layers.4)"
    dtype: source
  - group: mtp
    drop: true
publish: {base_model: org/small, languages: [en], license: mit, acknowledge_license: mit}
"""


def ignore(done: int, total: int) -> None:
    pass


def open_build(root: Path) -> Build:
    """The build in a workspace, as the flow opens it."""
    return Build(
        BuildSpec(
            recipe=str(root / "again.yaml"),
            source=str(root / "source"),
            workspace=str(root / "work"),
        )
    )


def run(build: Build) -> None:
    """Every stage up to the card, with measurements that were taken elsewhere."""
    for stage in (DownloadStage(build), PlanStage(build)):
        stage.run(ignore)
    for shard in range(len(build.plan.shards)):
        QuantizeStage(build, shard).run(ignore)
    AssembleStage(build).run(ignore)
    made = BuildRecord.load(build.workspace.records / "assemble.json")
    assert made is not None
    found = ParityStageRecord(fingerprint="", found=PARITY)
    compared = rich_divergence().model_copy(update={"build": made.manifest_sha256})
    keep(ParityStage(build), found)
    keep(DivergenceStage(build), compared)
    keep(EvaluationStage(build), rich_evaluation(EPYC))
    CardStage(build).run(ignore)


def keep(stage: Stage, record: Record) -> None:
    stage.keep(record.model_copy(update={"fingerprint": stage.fingerprint()}))


@pytest.fixture(scope="module")
def finished(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with source, recipe and the workspace of a finished run."""
    root = tmp_path_factory.mktemp("finished")
    shutil.copytree(small, root / "source")
    (root / "again.yaml").write_text(RECIPE)
    build = open_build(root)
    build.workspace.create()
    run(build)
    return root


@pytest.fixture
def workspace(finished: Path, tmp_path: Path) -> Path:
    """A copy of that folder, to be changed."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def card_files(build: Build) -> dict[str, bytes]:
    folder = build.workspace.checkpoint
    files = [folder / "README.md", *sorted((folder / "assets").iterdir())]
    return {file.name: file.read_bytes() for file in files}


def test_the_same_bytes_come_out_without_the_source(workspace: Path) -> None:
    """The source may be gone; card, charts and the card's record are what the flow made."""
    build = open_build(workspace)
    before = card_files(build)
    record = build.workspace.records / "card.json"
    made = record.read_bytes()
    shutil.rmtree(workspace / "source")
    shutil.rmtree(build.workspace.checkpoint / "assets")
    (build.workspace.checkpoint / "README.md").unlink()
    record.unlink()
    render_again(build.workspace)
    assert card_files(build) == before
    assert len(before) > 5
    assert record.read_bytes() == made


def test_publishing_asks_for_nothing_again(workspace: Path, tmp_path: Path) -> None:
    """`publish WORKSPACE --to PLACE` needs neither recipe nor source, and a run finds it done.

    With `--dry-run` it shows the same and writes nothing. What is not finished is not published.
    """
    build, target = open_build(workspace), tmp_path / "published"
    shutil.move(workspace / "source", tmp_path / "away")
    shutil.move(workspace / "again.yaml", tmp_path / "away.yaml")
    command = ("publish", workspace / "work", "--to", target)
    shown = json.loads(run_command(*command, "--dry-run", "--json").stdout)[str(target)]
    assert not target.exists()
    assert f"{len(shown['added'])} added" in run_command(*command).stdout
    checkpoint = build.workspace.checkpoint
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    assert {change["name"] for change in shown["added"]} == files
    assert all((target / name).read_bytes() == (checkpoint / name).read_bytes() for name in files)
    shutil.move(tmp_path / "away", workspace / "source")
    shutil.move(tmp_path / "away.yaml", workspace / "again.yaml")
    assert PublishStage(open_build(workspace), str(target)).current() is not None
    (build.workspace.records / "parity.json").unlink()
    assert "Say `glm-quant card" in run_command(*command, expect=1).stderr
    (build.workspace.records / "card.json").unlink()
    assert "nothing is published unproved" in run_command(*command, expect=1).stderr


@pytest.mark.parametrize(
    "stage", ["download", "plan", "assemble", "parity", "divergence", "evaluate"]
)
def test_a_missing_record_is_named(workspace: Path, stage: str) -> None:
    """The old card stays, and nothing is told of what was not recorded."""
    build = open_build(workspace)
    before = card_files(build)
    (build.workspace.records / f"{stage}.json").unlink()
    with pytest.raises(CardError, match=f"record of stage '{stage}', which is missing"):
        render_again(build.workspace)
    assert card_files(build) == before


def test_another_recipe_makes_void_what_was_measured(workspace: Path) -> None:
    """A run that ended before measuring leaves no card that mixes two builds."""
    recipe = workspace / "again.yaml"
    recipe.write_text(RECIPE.replace("dtype: source", "dtype: float32"))
    build = open_build(workspace)
    PlanStage(build).run(ignore)
    records = build.workspace.records
    assert {p.name for p in records.glob("*.json")} == {"download.json", "plan.json"}
    with pytest.raises(CardError, match="record of stage 'assemble', which is missing"):
        render_again(build.workspace)


def test_assembling_again_voids_only_another_builds_proofs(workspace: Path) -> None:
    """The same build keeps what was measured of it; with another card text it does not."""
    build = open_build(workspace)
    (build.workspace.checkpoint / "config.json").unlink()
    AssembleStage(build).run(ignore)
    assert ParityStage(build).current() is not None
    recipe = workspace / "again.yaml"
    recipe.write_text(RECIPE.replace("org/small", "org/other"))
    AssembleStage(open_build(workspace)).run(ignore)
    assert not (build.workspace.records / "parity.json").exists()


def test_a_changed_config_is_refused(workspace: Path) -> None:
    """Memory is computed from config.json: it must be the one that was made."""
    build = open_build(workspace)
    config = build.workspace.checkpoint / "config.json"
    config.write_text(
        config.read_text().replace('"num_hidden_layers": 4', '"num_hidden_layers": 5')
    )
    with pytest.raises(IntegrityError, match=r"config\.json.*sha256"):
        render_again(build.workspace)


def test_a_recipe_of_another_version_is_refused_in_words(workspace: Path) -> None:
    """What this version cannot read is named, with the way out."""
    build = open_build(workspace)
    folder, record = build.workspace.checkpoint, build.workspace.records / "assemble.json"
    manifest = load_manifest(folder)
    manifest.model_copy(update={"recipe": {**manifest.recipe, "novel": 1}}).save(folder)
    made = BuildRecord.load(record)
    assert made is not None
    outputs = [FileDigest.of(folder, output.path) for output in made.outputs]
    made.model_copy(update={"outputs": outputs}).save(record)
    with pytest.raises(CardError, match=r"another version of glm-quant \(novel: "):
        render_again(build.workspace)


def test_a_workspace_in_use_is_left_alone(workspace: Path) -> None:
    """A run may be writing the same files."""
    build = open_build(workspace)
    with build.workspace.locked(), pytest.raises(BusyError):
        render_again(build.workspace)


def test_every_number_is_derived_from_the_records(workspace: Path) -> None:
    """Whatever stands on the card can be computed again from the JSON of the records."""
    card = (workspace / "work" / "checkpoint" / "README.md").read_text()
    assert unexplained(card, workspace / "work") == []
    assert len(numbers(card)) > 200


@pytest.mark.parametrize(
    ("at", "typed", "found"),
    [
        ("## Why this model", "It is 31.7 % faster.", "31.7 %"),
        ("## Quality", "Perplexity 3.141.", "3.141"),
        ("## Hardware and memory", "It fits 187.3 GB.", "187.3 GB"),
        ("## Recipe", "| Experts | 3-bit | 1.23B |", "3-bit"),
    ],
)
def test_a_number_that_someone_typed_is_found(
    workspace: Path, at: str, typed: str, found: str
) -> None:
    """The check can fail: a figure in the template that no record has is told."""
    card = (workspace / "work" / "checkpoint" / "README.md").read_text()
    assert found in unexplained(card.replace(at, f"{at}\n\n{typed}\n"), workspace / "work")


def test_the_template_itself_has_no_numbers() -> None:
    """Outside commands, its own words have only those constants that are given a reason."""
    template = files("glm_quant.report").joinpath("card.md.jinja").read_text()
    words = "".join(
        text for _, kind, text in Environment(autoescape=True).lex(template) if kind == "data"
    )
    found = numbers(re.sub(r"```.*?```", "", words, flags=re.DOTALL))
    assert set(found) <= CONSTANTS.keys(), set(found) - CONSTANTS.keys()


def test_a_run_whose_card_is_there_does_without_matplotlib() -> None:
    """Its import takes a second, which a run that draws nothing should not pay."""
    code = "import sys, flows.release, flows.assess; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
