"""A finished build, whoever made it, is what its manifest says."""

from glm_quant.artifact import Record, sha256_file
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.errors import CheckpointError
from glm_quant.fingerprint import Canonical
from glm_quant.quantize.convert import Progress
from glm_quant.quantize.verify import verify
from glm_quant.stages.base import Stage


class VerifyRecord(Record):
    """What a verification has looked at."""

    files: int
    size_bytes: int
    tensors: int
    rederived_blocks: int


class VerifyStage(Stage[VerifyRecord]):
    """Every byte has its recorded sha256, and sampled blocks follow from the source."""

    name = "verify"
    record_type = VerifyRecord

    def inputs(self) -> Canonical:
        """Return the manifest's digest."""
        path = self.build.workspace.checkpoint / MANIFEST_NAME
        if not path.is_file():
            raise CheckpointError(
                f"{path}: there is no manifest, so this is no finished build. Give the folder that "
                "`glm-quant run` or `convert` made."
            )
        return {"manifest": sha256_file(path)}

    def current(self) -> VerifyRecord | None:
        """Return None: a disk may have lost bits since the last look."""
        return None

    def make(self, progress: Progress) -> VerifyRecord:
        """Verify.

        Raises:
            CheckpointError: no manifest, or a header that lies.
            IntegrityError: something is missing, changed, stray, or not what the source gives.
        """
        found = verify(self.build.workspace.checkpoint, self.build.checkpoint.source)
        progress(1, 1)
        return VerifyRecord(
            fingerprint=self.fingerprint(),
            files=found.files,
            size_bytes=found.size_bytes,
            tensors=found.tensors,
            rederived_blocks=found.rederived_blocks,
        )

    def summarize(self, record: VerifyRecord) -> str:
        """Return what was looked at."""
        return (
            f"{record.files} files, {record.size_bytes / 1e9:,.3f} GB and {record.tensors:,} "
            f"tensors are whole; {record.rederived_blocks} blocks made again and equal"
        )
