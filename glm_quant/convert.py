"""`glm-quant convert`: the stages up to the assembled build, into a folder, without Prefect.

Records and partial shards stand beside the output, in `.NAME.glm-quant/`, so that the output holds
nothing but the build, and the same command again finds what is done.
"""

from collections.abc import Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from glm_quant.build import Build, BuildSpec, claimed
from glm_quant.checkpoint.manifest import load_manifest
from glm_quant.errors import OutputError
from glm_quant.hub import DEFAULT_WINDOW
from glm_quant.litter import entries
from glm_quant.ownership import Owner, require_owner, source_identity
from glm_quant.quantize.convert import Watcher
from glm_quant.recipe import Recipe, load_recipe
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.base import Stage
from glm_quant.stages.calibrate import CalibrateStage
from glm_quant.stages.download import DownloadStage
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.workspace import workspace_beside


class ConvertSummary(BaseModel):
    """What a conversion came to."""

    model_config = ConfigDict(frozen=True)

    output: str
    bits_per_weight: float
    tensor_bytes: int
    shards: int
    fingerprint: str

    def describe(self) -> str:
        """Return one line."""
        return (
            f"{self.tensor_bytes / 1e9:,.3f} GB in {self.shards} shards, "
            f"{self.bits_per_weight:.3f} bits per weight, fingerprint {self.fingerprint[:12]}"
        )


def open_conversion(
    source: str | Path,
    recipe: str,
    output: Path,
    workers: int | None = None,
    window: int = DEFAULT_WINDOW,
    reuse: Sequence[str] = (),
) -> Build:
    """Open the build that a conversion makes in a folder; nothing is written yet.

    Args:
        source: folder or URI of the checkpoint.
        recipe: path of a .yaml file, or a name in recipes/.
        output: folder to make.
        workers: threads that encode; default: one a core.
        window: fetched source shards on disk at a time.
        reuse: workspaces or outputs of other conversions, whose tensors may be copied.

    Raises:
        InputError: one of them is not what it should be.
    """
    workspace = workspace_beside(output)
    spec = BuildSpec(
        recipe=recipe,
        source=str(source),
        workspace=str(workspace.root),
        output=str(workspace.checkpoint),
        window=window,
        reuse=tuple(reuse),
    )
    build = Build(spec, workers, publishes=False)
    build.checkpoint.require_weights()
    _check_output(build)
    return build


def convert_to_folder(build: Build, watcher: Watcher) -> ConvertSummary:
    """Make the output, or what is missing of it.

    Args:
        build: what `open_conversion` returned; it is closed in the end.
        watcher: is told which stage begins and how it moves.

    Raises:
        BusyError: another process is converting into it.
    """
    with claimed(build.spec), closing(build):
        owner_of(build.recipe, build.checkpoint.source.uri).save(build.workspace)
        build.require_space()
        for stage in (DownloadStage(build), PlanStage(build)):
            stage.run(lambda *_: None)
        for stage in _stages_of_weights(build):
            _run(stage, watcher)
    manifest = load_manifest(build.workspace.checkpoint)
    return ConvertSummary(
        output=str(build.workspace.checkpoint),
        bits_per_weight=manifest.totals["bits_per_weight"],
        tensor_bytes=int(manifest.totals["tensor_bytes"]),
        shards=len(manifest.shards),
        fingerprint=manifest.fingerprint,
    )


def require_output_free(source: str, recipe: str, output: Path, replace: bool) -> None:
    """Refuse an output where the build of another recipe or source stands.

    Raises:
        OutputError: one does, and `replace` is not given.
    """
    require_owner(workspace_beside(output), owner_of(load_recipe(recipe), source), source, replace)


def owner_of(recipe: Recipe, source: str) -> Owner:
    """Return whose an output is that a conversion makes."""
    return Owner(recipe=recipe.name, source=source_identity(source))


def _stages_of_weights(build: Build) -> Generator[Stage[Any]]:
    """Return the stages one by one: what comes after the calibration depends on it."""
    if build.plan.uncalibrated:
        yield CalibrateStage(build, with_reference=False)
    for shard in range(len(build.plan.shards)):
        yield QuantizeStage(build, shard)
    yield AssembleStage(build)


def _run(stage: Stage[Any], watcher: Watcher) -> None:
    watcher.begin(stage.name)
    stage.run(lambda done, total: watcher.move(stage.name, done, total))


def _check_output(build: Build) -> None:
    """Refuse an output folder that no conversion of ours was making."""
    workspace = build.workspace
    output = workspace.checkpoint
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(f"{output}: this is a file. Choose a folder for --output.")
    if output.stat().st_dev != output.parent.stat().st_dev:
        raise OutputError(
            f"{output}: this is the top of a disk of its own; finished shards are moved into the "
            f"output from beside it. Choose a folder on that disk, such as {output / 'build'}."
        )
    names = [path.name for path in entries(output)]
    expected = {shard.name for shard in build.plan.shards}
    expected |= {path.stem for path in entries(workspace.shard_records, "*.json")}
    begun = workspace.root.exists()
    foreign = [
        name
        for name in names
        if not begun or (name.endswith(".safetensors") and name not in expected)
    ]
    if foreign:
        raise OutputError(
            f"{output}: the folder holds something else ({foreign[0]}). Choose an empty folder for "
            "--output."
        )
