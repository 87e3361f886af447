"""One output shard: the stage that makes weights."""

from pathlib import Path

from glm_quant.build import Build
from glm_quant.fingerprint import Canonical
from glm_quant.quantize.convert import Progress, ShardRecord
from glm_quant.stages.base import Stage, shard_title


class QuantizeStage(Stage[ShardRecord]):
    """One output shard."""

    name = "quantize"
    record_type = ShardRecord

    def __init__(self, build: Build, shard: int) -> None:
        """Attach to an output shard of a build."""
        super().__init__(build)
        self.shard = shard

    @property
    def title(self) -> str:
        """Which part this is: quantize 03 of 46."""
        return f"quantize {shard_title(self.build, self.shard)}"

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
