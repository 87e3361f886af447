"""Every output byte has its place before the first one is made."""

from pydantic import BaseModel, ConfigDict

from glm_quant.artifact import Record
from glm_quant.build import Build
from glm_quant.fingerprint import Canonical
from glm_quant.quantize.convert import Progress
from glm_quant.quantize.plan import GroupTotals
from glm_quant.report.memory import memory_needs
from glm_quant.stages.base import PROOFS, Stage


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
    needs = memory_needs(plan.geometry, plan.tensor_bytes, limit) if plan.geometry else []
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
        peak_disk_bytes=max(outputs.peak_disk_bytes, disk + build.kept_source_bytes),
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
        self.build.require_space()
        progress(1, 1)
        return PlanRecord(fingerprint=self.fingerprint(), plan=plan_figures(self.build))

    def summarize(self, record: PlanRecord) -> str:
        """Return parameters, bits per weight, bytes, shards."""
        plan = record.plan
        return (
            f"{plan.params:,} parameters at {plan.bits_per_weight:.3f} bits per weight: "
            f"{plan.tensor_bytes / 1e9:,.3f} GB in {len(plan.shards)} shards"
        )
