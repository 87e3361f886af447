"""The process that streams source and build: a request in, the record out.

`python -m glm_quant.stages.divergence_worker REQUEST OUTPUT`. The record's outputs, and what a
later try goes on from, stand in the request's folder.
"""

import sys
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.evaluation.divergence import divergence
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.process import Progress, serve
from glm_quant.evaluation.token_set import make_token_set
from glm_quant.hub import open_source
from glm_quant.settings import DivergenceSettings


class DivergenceRequest(BaseModel):
    """What the worker shall compare.

    Attributes:
        source: folder, or URI with the commit; it is read by range.
        folder: for records and states.
        checkpoint: the build to stream, this one's or a baseline's.
        settings: the tokens, and where the reference is kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    folder: Path
    checkpoint: Path
    settings: DivergenceSettings


def compare(data: bytes, progress: Progress) -> DivergenceRecord:
    """Do a request."""
    request = DivergenceRequest.model_validate_json(data)
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


if __name__ == "__main__":
    serve(sys.argv[1:], compare)
