"""`glm-quant convert`: plan, quantize and assemble into a folder, without Prefect.

Records and partial shards stand beside the output, in `.NAME.glm-quant/`, so that the output holds
nothing but the build and the same command again finds what is done.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from glm_quant.checkpoint.manifest import Manifest
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.checkpoint.source import Source
from glm_quant.errors import OutputError
from glm_quant.litter import entries
from glm_quant.ownership import Owner, require_owner, source_identity
from glm_quant.quantize.assemble import assemble
from glm_quant.quantize.convert import Conversion, Watcher
from glm_quant.quantize.layout import PlannedShard
from glm_quant.quantize.plan import make_plan
from glm_quant.recipe import Recipe, load_recipe
from glm_quant.workspace import Workspace, existing_workspace, workspace_beside

__all__ = ["ConvertSummary", "convert_to_folder", "open_conversion", "workspace_beside"]

_log = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class OpenConversion:
    """A conversion into a folder, planned and checked."""

    recipe: Recipe
    checkpoint: Checkpoint
    conversion: Conversion
    workspace: Workspace
    output: Path

    @property
    def shards(self) -> tuple[PlannedShard, ...]:
        """The planned output shards."""
        return self.conversion.plan.shards


def open_conversion(
    source: str | Path | Source,
    recipe: str,
    output: Path,
    workers: int | None = None,
    reuse: Sequence[str] = (),
    imatrix: Path | None = None,
) -> OpenConversion:
    """Check source, recipe and output folder, and plan.

    Args:
        source: a folder, or what `glm_quant.hub.open_source` returned.
        recipe: path of a .yaml file, or a name in recipes/.
        output: folder to make.
        workers: threads; default: one a core.
        reuse: workspaces or outputs of other conversions, whose tensors may be copied.
        imatrix: folder of the recipe's own calibration, where it wants one and has it.

    Raises:
        InputError: one of them is not what it should be.
    """
    loaded = load_recipe(recipe)
    checkpoint = Checkpoint.open(source)
    workspace = workspace_beside(output)
    plan = make_plan(checkpoint, loaded, imatrix)
    checkpoint.require_weights()
    _check_output(workspace, {shard.name for shard in plan.shards})
    for warning in plan.warnings:
        _log.warning("%s", warning)
    others = [existing_workspace(folder) for folder in reuse]
    conversion = Conversion(checkpoint, plan, workspace, workers, others)
    return OpenConversion(loaded, checkpoint, conversion, workspace, workspace.checkpoint)


def convert_to_folder(opened: OpenConversion, watcher: Watcher) -> ConvertSummary:
    """Make the output, or what is missing of it.

    Raises:
        BusyError: another process is converting into it.
    """
    opened.workspace.create()
    with opened.workspace.locked():
        owner_of(opened.recipe, opened.checkpoint.source.uri).save(opened.workspace)
        opened.conversion.check_space()
        with opened.conversion as working:
            for shard in range(len(opened.shards)):
                watcher.begin("quantize")
                working.complete(shard, lambda done, total: watcher.move("quantize", done, total))
        watcher.begin("assemble")
        manifest = assemble(opened.conversion, opened.checkpoint, opened.recipe, opened.output)
        opened.conversion.clean()
        opened.workspace.pin.unlink(missing_ok=True)
    return _summary(opened.output, manifest)


def require_output_free(source: str, recipe: str, output: Path, replace: bool) -> None:
    """Refuse an output where the build of another recipe or source stands.

    Raises:
        OutputError: one does, and `replace` is not given.
    """
    require_owner(workspace_beside(output), owner_of(load_recipe(recipe), source), source, replace)


def owner_of(recipe: Recipe, source: str) -> Owner:
    """Return whose an output is that a conversion makes."""
    return Owner(recipe=recipe.name, source=source_identity(source))


def _summary(output: Path, manifest: Manifest) -> ConvertSummary:
    return ConvertSummary(
        output=str(output),
        bits_per_weight=manifest.totals["bits_per_weight"],
        tensor_bytes=int(manifest.totals["tensor_bytes"]),
        shards=len(manifest.shards),
        fingerprint=manifest.fingerprint,
    )


def _check_output(workspace: Workspace, planned: set[str]) -> None:
    """Refuse an output folder that no conversion of ours was making."""
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
    ours = planned | {path.stem for path in entries(workspace.shard_records, "*.json")}
    begun = workspace.root.exists()
    foreign = [n for n in names if not begun or (n.endswith(".safetensors") and n not in ours)]
    if foreign:
        raise OutputError(
            f"{output}: the folder holds something else ({foreign[0]}). Choose an empty folder for "
            "--output."
        )
