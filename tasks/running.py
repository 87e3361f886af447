"""The one way in which a task runs its stage."""

import logging
from typing import Any

from glm_quant.stages.base import Stage, StageResult
from tasks.progress import progress_of

_log = logging.getLogger("glm_quant.stages")


def run_stage(stage: Stage[Any]) -> StageResult:
    """Run a stage with its progress shown, and log its result."""
    result = stage.run(progress_of(stage))
    _log.info("%s: %s", result.stage, result.summary)
    return result
