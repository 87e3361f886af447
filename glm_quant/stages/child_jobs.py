"""What stages run in processes of their own: comparisons of a build with its source.

The functions stand here because they open the source by its URI: `parity` and `evaluation` know
nothing of the Hub and S3.
"""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.child_process import ChildJob, Progress
from glm_quant.errors import EvaluationError, ParityError
from glm_quant.evaluation.divergence import divergence
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.token_set import make_token_set
from glm_quant.hub import open_source
from glm_quant.parity.check import ParityRecord, check_parity
from glm_quant.recipe import ParitySettings
from glm_quant.settings import DivergenceSettings
from glm_quant.workspace import Workspace


class ParityRequest(BaseModel):
    """What the parity job compares.

    Attributes:
        source: folder, or URI with the commit; read a layer at a time.
        workspace: folder of the build's workspace: what is fetched stands there for a while.
        checkpoint: folder of the build.
        window: whole source shards on disk at a time, where a small source is fetched whole.
        settings: prompt, layers and bounds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    workspace: Path
    checkpoint: Path
    window: int
    settings: ParitySettings


class DivergenceRequest(BaseModel):
    """What the divergence job compares.

    Attributes:
        source: folder, or URI with the commit; it is read by range.
        folder: for records and states; a later try goes on from what stands there.
        checkpoint: the build to stream, this one's or a baseline's.
        settings: the tokens, and where the reference is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    folder: Path
    checkpoint: Path
    settings: DivergenceSettings


def compare_with_reference(request: ParityRequest, progress: Progress) -> ParityRecord:
    """Hold a build, and its runtime on the source's weights, against transformers."""
    workspace = Workspace(request.workspace)
    return check_parity(
        Checkpoint(open_source(request.source, workspace, request.window)),
        request.checkpoint,
        request.settings,
        scratch=workspace.scratch,
        progress=progress,
    )


def compare_with_source(request: DivergenceRequest, progress: Progress) -> DivergenceRecord:
    """Stream a build and its source over the same tokens."""
    settings, source = request.settings, Checkpoint(open_source(request.source))
    shared = settings.references
    return divergence(
        source,
        request.checkpoint,
        make_token_set(source, settings),
        request.folder,
        references=None if shared is None else Path(shared).expanduser(),
        memory_bytes=settings.memory_bytes,
        progress=progress,
    )


PARITY_JOB = ChildJob(
    f"{__name__}:{compare_with_reference.__name__}",
    ParityRecord,
    "compares the build with the reference",
    ParityError,
)
DIVERGENCE_JOB = ChildJob(
    f"{__name__}:{compare_with_source.__name__}",
    DivergenceRecord,
    "compares the build with its source",
    EvaluationError,
)
