"""The stages that make the weights: source, plan, calibrate, quantize (a shard each), assemble."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from glm_quant import __version__
from glm_quant.artifact import FileDigest, Record
from glm_quant.build import Build
from glm_quant.calibration.own import STAGE as CALIBRATE
from glm_quant.calibration.own import CalibrationRecord, calibrate_build, calibration_inputs
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.fingerprint import Canonical
from glm_quant.quantize.assemble import COMPANIONS, RUNTIME_NAME, assemble, source_label
from glm_quant.quantize.convert import Progress, ShardRecord
from glm_quant.quantize.plan import GroupTotals
from glm_quant.report.memory import memory_needs
from glm_quant.stages.base import Stage

# The records that speak of one assembled build.
PROOFS = ("parity", "divergence", "evaluate", "card")


class SourceRecord(Record):
    """What was found at the source: every header was read and held against the config."""

    uri: str
    revision: str | None
    shards: int
    tensors: int
    size_bytes: int


class DownloadStage(Stage[SourceRecord]):
    """The source is whole. A folder is used where it is; nothing is copied."""

    name = "download"
    record_type = SourceRecord

    def inputs(self) -> Canonical:
        """Return the identity of every file of the source."""
        checkpoint = self.build.checkpoint
        return {
            "uri": checkpoint.source.uri,
            "files": {name: file.identity for name, file in checkpoint.files.items()},
        }

    def make(self, progress: Progress) -> SourceRecord:
        """Count what opening the build has checked."""
        checkpoint = self.build.checkpoint
        tensors = checkpoint.tensors  # raises where a shard or tensor is missing
        shards = [checkpoint.files[name] for name in checkpoint.index.shards]
        progress(len(shards), len(shards))
        return SourceRecord(
            fingerprint=self.fingerprint(),
            uri=source_label(checkpoint),
            revision=checkpoint.source.uri.partition("@")[2] or None,
            shards=len(shards),
            tensors=len(tensors),
            size_bytes=sum(shard.size_bytes for shard in shards),
        )

    def summarize(self, record: SourceRecord) -> str:
        """Return shards, tensors and size."""
        return (
            f"{record.uri}: {record.shards} shards, {record.tensors:,} tensors, "
            f"{record.size_bytes / 1e9:,.3f} GB"
        )


class PlannedFile(BaseModel):
    """An output shard as planned."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size_bytes: int


class PlanFigures(BaseModel):
    """What will be made, in numbers.

    Attributes:
        disk_bytes: of the output shards, headers included.
        source_shards: how many source shards are read.
        open_outputs: the most output shards that are begun and not full at a time.
        peak_disk_bytes: the output and the source shards that stand on disk beside it.
        memory_bytes: weights, 16-bit caches and prefill at some context lengths.
        dropped: tensors of the source that are left out.
        calibrates: the weights' inputs are measured before anything is encoded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    params: int
    tensor_bytes: int
    bits_per_weight: float
    tensors: int
    shards: list[PlannedFile]
    groups: list[GroupTotals]
    dropped: int
    disk_bytes: int
    source_shards: int
    open_outputs: int
    peak_disk_bytes: int
    memory_bytes: dict[int, int]
    calibrates: bool = False


class PlanRecord(Record):
    """The plan, written down."""

    plan: PlanFigures


def plan_figures(build: Build) -> PlanFigures:
    """Return the figures of a build's plan."""
    plan = build.plan
    limit = int(build.checkpoint.config.get("max_position_embeddings", 0))
    outputs = build.conversion.outputs
    disk = sum(shard.size_bytes for shard in plan.shards)
    needs = memory_needs(plan.geometry, plan.tensor_bytes, limit)
    return PlanFigures(
        recipe=build.recipe.name,
        params=plan.params,
        tensor_bytes=plan.tensor_bytes,
        bits_per_weight=plan.bits_per_weight,
        tensors=sum(1 for _ in plan.tensors),
        shards=[PlannedFile(name=s.name, size_bytes=s.size_bytes) for s in plan.shards],
        groups=plan.groups(),
        dropped=len(plan.dropped),
        disk_bytes=disk,
        source_shards=len(outputs.source_order),
        open_outputs=outputs.most_open,
        peak_disk_bytes=max(outputs.peak_disk_bytes, disk + build.pass_bytes),
        memory_bytes={need.context: need.total_bytes for need in needs},
        calibrates=build.recipe.own_calibration is not None,
    )


class PlanStage(Stage[PlanRecord]):
    """Every output byte has its place, and the disk has room for it."""

    name = "plan"
    record_type = PlanRecord
    decides = ("assemble", *PROOFS)

    def inputs(self) -> Canonical:
        """Return the layout of all planned shards: what a calibration finds out comes later."""
        conversion = self.build.conversion
        shards = range(len(self.build.plan.shards))
        return {
            "recipe": self.build.recipe.name,
            "shards": [conversion.outputs.layout(shard) for shard in shards],
        }

    def make(self, progress: Progress) -> PlanRecord:
        """Write the plan down.

        Raises:
            DiskSpaceError: the build does not fit on the disk.
        """
        self.build.conversion.check_space(self.build.lets_go, self.build.pass_bytes)
        progress(1, 1)
        return PlanRecord(fingerprint=self.fingerprint(), plan=plan_figures(self.build))

    def summarize(self, record: PlanRecord) -> str:
        """Return parameters, bits per weight, bytes, shards."""
        plan = record.plan
        return (
            f"{plan.params:,} parameters at {plan.bits_per_weight:.3f} bits per weight: "
            f"{plan.tensor_bytes / 1e9:,.3f} GB in {len(plan.shards)} shards"
        )


class CalibrateStage(Stage[CalibrationRecord]):
    """How loud the inputs of each weight are, where the recipe wants to know it."""

    name = CALIBRATE
    record_type = CalibrationRecord

    def inputs(self) -> Canonical:
        """Return the texts, the settings, and the source."""
        return calibration_inputs(self.build.checkpoint, self.build.recipe)

    def make(self, progress: Progress) -> CalibrationRecord:
        """Stream texts through the source, and those of the divergence stage with them.

        Where the source is not a folder the weights are encoded on the way.

        Raises:
            RecipeError: a text cannot be read, or is one that is evaluated.
            EvaluationError: the memory is too small for the longest sequence.
        """
        build = self.build
        return calibrate_build(
            build.checkpoint,
            build.recipe,
            build.workspace,
            progress,
            reference=True,
            converting=build.conversion if build.converts_too else None,
        )

    def keep(self, record: CalibrationRecord) -> None:
        """Write the record, and plan with what was found."""
        super().keep(record)
        self.build.make_plan()

    def summarize(self, record: CalibrationRecord) -> str:
        """Return what was seen, and which experts met too little of it."""
        return (
            f"{record.tokens:,} tokens, {record.weights:,} weights, {record.factors:,} factors; "
            f"{record.thin:,} of {record.experts:,} experts met too few tokens of their own"
            f"{_worst_layer(record)}"
        )


def _worst_layer(record: CalibrationRecord) -> str:
    if not record.layers:
        return ""
    layer, error = max(record.layers.items(), key=lambda item: item[1].of_added)
    return (
        f"; encoded too, layer {layer} has the largest error: {error.of_added:.2%} of what it adds"
    )


class QuantizeStage(Stage[ShardRecord]):
    """One output shard."""

    name = "quantize"
    record_type = ShardRecord

    def __init__(self, build: Build, shard: int) -> None:
        """Attach to an output shard of a build."""
        super().__init__(build)
        self.shard = shard

    @property
    def record_path(self) -> Path:
        """Where the shard's record stands."""
        return self.build.conversion.outputs.record_path(self.shard)

    @property
    def root(self) -> Path:
        """The checkpoint folder."""
        return self.build.workspace.checkpoint

    def inputs(self) -> Canonical:
        """Return the shard's inputs; its fingerprint is the conversion's own."""
        return self.build.conversion.outputs.fingerprint(self.shard)

    def fingerprint(self) -> str:
        """Return the fingerprint under which the conversion records the shard."""
        return self.build.conversion.outputs.fingerprint(self.shard)

    def is_whole(self, record: ShardRecord) -> bool:
        """Whether the shard is here, or kept elsewhere."""
        return all(map(self.build.conversion.outputs.is_kept, record.outputs))

    def make(self, progress: Progress) -> ShardRecord:
        """Complete the shard."""
        return self.build.conversion.complete(self.shard, progress)

    def keep(self, record: ShardRecord) -> None:
        """Do nothing: the conversion recorded the shard itself, with or without a flow."""

    def summarize(self, record: ShardRecord) -> str:
        """Return the file's name, size and digest."""
        file = record.outputs[0]
        return f"{file.path}: {file.size_bytes / 1e6:,.1f} MB, sha256 {file.sha256[:12]}"


class BuildRecord(Record):
    """A whole build: its outputs are every file of the checkpoint but the card.

    Attributes:
        machine: where it was assembled: system, architecture, cores. The manifest has no machine
            and no time, so that it is the same wherever and whenever it is made.
        finished_at: when, in UTC.
    """

    weights_fingerprint: str
    manifest_sha256: str
    versions: dict[str, str]
    size_bytes: int
    machine: str
    finished_at: str


class AssembleStage(Stage[BuildRecord]):
    """Config, index, tokenizer, runtime and manifest around finished shards."""

    name = "assemble"
    record_type = BuildRecord
    decides = PROOFS

    @property
    def root(self) -> Path:
        """The checkpoint folder."""
        return self.build.workspace.checkpoint

    def inputs(self) -> Canonical:
        """Return the shards' fingerprints, the files that come along, the runtime, the recipe."""
        build, outputs = self.build, self.build.conversion.outputs
        return {
            "shards": [outputs.fingerprint(shard) for shard in range(len(build.plan.shards))],
            "companions": {
                name: build.checkpoint.files[name].identity
                for name in ("config.json", *COMPANIONS)
                if name in build.checkpoint.files
            },
            "runtime": files("glm_quant.model").joinpath(RUNTIME_NAME).read_text(encoding="utf-8"),
            "recipe": build.recipe.model_dump_json(),
            "versions": [__version__, version("mlx")],
        }

    def is_whole(self, record: BuildRecord) -> bool:
        """Whether every file is here; shards may be kept elsewhere."""
        return all(map(self.build.conversion.outputs.is_kept, record.outputs))

    def make(self, progress: Progress) -> BuildRecord:
        """Write everything that is not weights, manifest last."""
        build = self.build
        folder = build.workspace.checkpoint
        manifest = assemble(build.conversion, build.checkpoint, build.recipe, folder)
        build.conversion.clean()
        progress(1, 1)
        account = FileDigest.of(folder, MANIFEST_NAME)
        outputs = [*(shard.file for shard in manifest.shards), *manifest.files, account]
        return BuildRecord(
            fingerprint=self.fingerprint(),
            outputs=outputs,
            weights_fingerprint=manifest.fingerprint,
            manifest_sha256=account.sha256,
            versions=manifest.versions,
            size_bytes=sum(output.size_bytes for output in outputs),
            machine=f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )

    def summarize(self, record: BuildRecord) -> str:
        """Return number and size of files."""
        return (
            f"{len(record.outputs)} files, {record.size_bytes / 1e9:,.3f} GB, "
            f"manifest sha256 {record.manifest_sha256[:12]}"
        )
