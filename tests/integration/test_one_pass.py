"""One pass that calibrates, makes the divergence's reference and converts, from a loopback Hub.

The bytes must be those of passes that do it apart, whatever happens on the way.
"""

import json
from collections.abc import Generator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from glm_quant.build import Build, BuildSpec
from glm_quant.calibration.build_calibration import imatrix_folder
from glm_quant.calibration.texts import calibration_set
from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.data import tiny_glm_path
from glm_quant.errors import WeightError
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.calibrate import CalibrateStage
from glm_quant.stages.plan import PlanStage, plan_figures
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.streaming.weights import BuildWeights, SourceWeights, Weights
from tests.hub_server import HubServer
from tests.plain import PLAIN

REPO = "org/tiny"
RULES = Path(PLAIN).read_text().replace("quantizer: search", "quantizer: gptq")
DIVERGENCE = "divergence: {tokens: 96, context: 96}\n"


def recipe(folder: Path, calibration: str = "tokens: 64, context: 64") -> str:
    """Write a recipe; returns its path."""
    path = folder / f"recipe-{len(list(folder.glob('recipe-*')))}.yaml"
    path.write_text(f"{RULES}calibration: {{{calibration}}}\n{DIVERGENCE}")
    return str(path)


def nothing(_done: int, _total: int) -> None:
    """See no progress."""


def calibrated(spec: BuildSpec) -> Build:
    """Plan and calibrate a build."""
    build = Build(spec)
    build.workspace.create()
    PlanStage(build).run(nothing)
    CalibrateStage(build).run(nothing)
    return build


def finish(build: Build) -> Build:
    """Make the weights of a build, and all else."""
    for shard in range(len(build.plan.shards)):
        QuantizeStage(build, shard).run(nothing)
    AssembleStage(build).run(nothing)
    build.conversion.close()
    return build


def contents(folder: Path) -> dict[str, bytes]:
    """Return a folder's files, but for the record that says where the source is."""
    told = ("manifest.json", "imatrix.json", "record.json")
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name not in told}


@pytest.fixture(scope="module")
def hub() -> Generator[HubServer]:
    """Give a Hub that has the small checkpoint."""
    with HubServer() as running, pytest.MonkeyPatch.context() as patch:
        running.add_folder(REPO, tiny_glm_path())
        patch.setenv("HF_ENDPOINT", running.url)
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        yield running


@pytest.fixture
def spec(tmp_path: Path, hub: HubServer) -> BuildSpec:
    """A build of the Hub's checkpoint."""
    hub.log.clear()
    work = str(tmp_path / "work")
    return BuildSpec(recipe=recipe(tmp_path), source=f"hf://{REPO}", workspace=work)


@pytest.fixture(scope="module")
def apart(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """A build from a folder: calibrated first, then converted."""
    folder = tmp_path_factory.mktemp("apart")
    work = str(folder / "work")
    build = calibrated(
        BuildSpec(recipe=recipe(folder), source=str(tiny_glm_path()), workspace=work)
    )
    assert not build.workspace.partial.exists()
    return finish(build)


def shard_requests(hub: HubServer) -> list[tuple[str, str | None]]:
    """The shards that were asked for, whole or in part; headers do not count."""
    found = hub.requests(r"^/cdn/.*model-.*safetensors$")
    return [
        (r.file, r.range) for r in found if r.range is None or not r.range.startswith("bytes=0-")
    ]


def test_one_pass_from_a_hub(hub: HubServer, spec: BuildSpec, apart: Build) -> None:
    """Each byte of the source is fetched once, and all is as if it had been done apart."""
    build = calibrated(spec)
    asked = shard_requests(hub)
    shards = sorted(build.checkpoint.index.shards)
    assert sorted(name for name, span in asked if span is None) == shards
    norm = build.checkpoint.tensors["model.norm.weight"]
    assert {span for _, span in asked if span} <= {f"bytes={norm.begin}-{norm.end - 1}"}
    assert not any(build.workspace.source.iterdir())
    finish(build)
    assert shard_requests(hub) == asked, "the conversion fetched what was encoded already"
    for one, other in (
        (build.workspace.checkpoint, apart.workspace.checkpoint),
        (imatrix_folder(build.workspace), imatrix_folder(apart.workspace)),
        (
            next(build.workspace.divergence.glob("reference-*")),
            next(apart.workspace.divergence.glob("reference-*")),
        ),
    ):
        assert contents(one) == contents(other)
    manifests = [
        json.loads((b.workspace.checkpoint / "manifest.json").read_bytes()) for b in (build, apart)
    ]
    for name in ("shards", "files", "imatrix", "fingerprint", "totals"):
        assert manifests[0][name] == manifests[1][name], name


def test_the_plan_counts_its_disk(hub: HubServer, spec: BuildSpec) -> None:
    """The plan has room for the shards of the pass; a repository without weights can be planned."""
    figures = plan_figures(Build(spec))
    sizes = [f.size for name, f in hub.head(REPO).items() if name.endswith(".safetensors")]
    # Of seven shards the three of a layer, and three ahead.
    beside = figures.peak_disk_bytes - figures.disk_bytes
    assert sum(sizes) - beside in sizes
    narrow = plan_figures(Build(spec.model_copy(update={"window": 1})))
    assert figures.disk_bytes < narrow.peak_disk_bytes < figures.peak_disk_bytes
    bare = {n: f for n, f in hub.head(REPO).items() if not n.endswith(".safetensors")}
    hub.add_commit("org/bare", bare)
    planned = plan_figures(Build(spec.model_copy(update={"source": "hf://org/bare"})))
    assert planned.peak_disk_bytes == planned.disk_bytes


def test_what_quantizing_does_to_a_layer(spec: BuildSpec, tmp_path: Path) -> None:
    """The recorded error of a layer is that of the finished build's layer, run by itself."""
    more = "tokens: 64, context: 64, convert: true"
    change = {"recipe": recipe(tmp_path, more), "source": str(tiny_glm_path())}
    build = calibrated(spec.model_copy(update=change))
    record = CalibrateStage(build).current()
    assert record is not None
    assert sorted(record.layers) == list(range(5))
    finish(build)
    source = SourceWeights(build.checkpoint)
    settings = build.recipe.own_calibration
    assert settings is not None
    sequences = calibration_set(build.checkpoint, settings).sequences[::2]  # three of the five
    gap = output = added = 0.0

    def passed(weights: Weights, x: mx.array) -> np.ndarray:
        return np.array(weights.layer(0)(x, weights.runtime.Span.of(None), None, None)[0])

    made = BuildWeights(build.workspace.checkpoint)
    for sequence in sequences:
        x = mx.array(source.embed(sequence))[None]
        y, other = passed(source, x), passed(made, x)
        gap += float(np.square(other - y, dtype=np.float64).sum())
        output += float(np.square(y, dtype=np.float64).sum())
        added += float(np.square(y - np.array(x), dtype=np.float64).sum())
    error = record.layers[0]
    assert error.tokens == sum(map(len, sequences))
    assert error.of_output == pytest.approx(gap / output, rel=1e-3)
    assert error.of_added == pytest.approx(gap / added, rel=1e-3)
    assert all(0 < e.of_output < e.of_added < 0.2 for e in record.layers.values())


def test_interrupted_and_changed(hub: HubServer, spec: BuildSpec, tmp_path: Path) -> None:
    """A pass that stops goes on at its layer; with other texts it encodes anew, rightly."""

    class StopError(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        if done == 3:
            raise StopError

    def begun(spec: BuildSpec) -> Build:
        build = Build(spec)
        build.workspace.create()
        with pytest.raises(StopError):
            CalibrateStage(build).run(stop)
        return build

    build = begun(spec)
    journal = (build.workspace.partial / "journal.jsonl").read_text()
    assert "layers.2." in journal
    assert "layers.3." not in journal
    other = spec.model_copy(update={"recipe": recipe(tmp_path, "tokens: 64, context: 64, seed: 3")})
    begun(other)
    finish(calibrated(other))
    fresh = other.model_copy(update={"workspace": str(tmp_path / "fresh")})
    expected = finish(calibrated(fresh.model_copy(update={"source": str(tiny_glm_path())})))
    assert contents(Path(spec.workspace) / "checkpoint") == contents(expected.workspace.checkpoint)


def test_what_was_made_is_not_encoded_again(
    hub: HubServer, spec: BuildSpec, apart: Build, tmp_path: Path
) -> None:
    """After an edit of the recipe the pass encodes just what the conversion will not copy."""
    build = finish(calibrated(spec))
    path = Path(spec.recipe)
    path.write_text(path.read_text().replace("lm_head], bits: 6", "lm_head], bits: 8"))
    # The calibration would stand; without it the pass goes through the source again.
    (build.workspace.records / "calibrate.json").unlink()
    (imatrix_folder(build.workspace) / "imatrix.json").unlink()
    again = calibrated(spec)
    journal = (again.workspace.partial / "journal.jsonl").read_text()
    assert "lm_head.weight" in journal
    assert ".layers." not in journal
    finish(again)
    assert contents(again.workspace.checkpoint) != contents(apart.workspace.checkpoint)


def test_broken_weight_stops_the_pass(hub: HubServer, spec: BuildSpec, tmp_path: Path) -> None:
    """NaN is noticed as soon as its layer is encoded or computed, and named."""
    folder = tmp_path / "broken"
    folder.mkdir()
    for file in tiny_glm_path().iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    index = json.loads((folder / INDEX_NAME).read_bytes())["weight_map"]
    name = "model.layers.4.mlp.experts.3.down_proj.weight"
    build = Build(spec)
    info = build.checkpoint.tensors[name]
    data = bytearray((folder / index[name]).read_bytes())
    data[info.begin : info.begin + 2] = b"\xc0\x7f"
    (folder / index[name]).write_bytes(data)
    hub.add_folder("org/broken", folder)
    with pytest.raises(WeightError, match=f"tensor {name}: 1 of .* values are NaN"):
        calibrated(spec.model_copy(update={"source": "hf://org/broken"}))
