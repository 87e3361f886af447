"""The source is there, whole, and what its headers say it is."""

from glm_quant.artifact import Record
from glm_quant.fingerprint import Canonical
from glm_quant.hub.license import SourceLicense, read_license
from glm_quant.quantize.assemble import source_label
from glm_quant.quantize.convert import Progress
from glm_quant.stages.base import Stage


class SourceRecord(Record):
    """What was found at the source: every header was read and held against the config.

    Attributes:
        license: what it says of its licence, so that the build can be published without it.
    """

    uri: str
    revision: str | None
    shards: int
    tensors: int
    size_bytes: int
    license: SourceLicense | None = None


class DownloadStage(Stage[SourceRecord]):
    """The source is whole. A folder is used where it is; nothing is copied."""

    name = "download"
    record_type = SourceRecord

    def inputs(self) -> Canonical:
        """Return the identity of every file of the source."""
        checkpoint = self.build.checkpoint
        return {
            "version": 2,
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
            license=read_license(checkpoint.source),
        )

    def summarize(self, record: SourceRecord) -> str:
        """Return shards, tensors and size."""
        return (
            f"{record.uri}: {record.shards} shards, {record.tensors:,} tensors, "
            f"{record.size_bytes / 1e9:,.3f} GB"
        )
