"""The stages that judge a finished build, whoever made it: verify, parity, divergence, evaluate.

A build's own stages know from the plan what they look at; here the build's manifest says it.
"""

from pydantic import BaseModel, ConfigDict, Field

from glm_quant.artifact import Record, sha256_file
from glm_quant.build import BuildSpec
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.errors import CheckpointError
from glm_quant.fingerprint import Canonical
from glm_quant.hub import DEFAULT_WINDOW
from glm_quant.quantize.convert import Progress
from glm_quant.quantize.verify import verify
from glm_quant.stages.base import Stage
from glm_quant.stages.proving import DivergenceStage, ParityStage

ASSESS_STAGES = ("verify", "parity", "divergence", "evaluate")


class AssessSpec(BaseModel):
    """What to judge, against what. Small and plain, so that it can be a Prefect parameter."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    checkpoint: str = Field(description="folder of the finished build")
    recipe: str = Field(description="recipe whose bounds and settings hold: a name, or a .yaml")
    source: str | None = Field(
        default=None, description="what it was made from; default: the recipe's source"
    )
    workspace: str = Field(default="assess", description="folder for the records")
    window: int = Field(default=DEFAULT_WINDOW, ge=1, description="source shards on disk at a time")

    def build(self) -> BuildSpec:
        """Return the build whose output the checkpoint is."""
        return BuildSpec(
            recipe=self.recipe,
            source=self.source,
            workspace=self.workspace,
            output=self.checkpoint,
            window=self.window,
        )


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


class AssessParityStage(ParityStage):
    """Parity of a build that the manifest, not a plan, identifies."""

    def inputs(self) -> Canonical:
        """Return the build's manifest, its source, and how they are compared."""
        return {
            "build": VerifyStage(self.build).inputs(),
            "source": self.build.checkpoint.source.uri,
            "how": self.how(),
        }


class AssessDivergenceStage(DivergenceStage):
    """Divergence of a build that the manifest, not a plan, identifies."""

    def inputs(self) -> Canonical:
        """Return the build's manifest, its source, and how they are compared."""
        return {
            "build": VerifyStage(self.build).inputs(),
            "source": self.build.checkpoint.source.uri,
            "how": self.how(),
        }
