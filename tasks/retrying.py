"""Which failures of a task may pass by themselves.

The clients of Hub and S3 have their own patience for minutes; this is for an outage of hours. A bad
input, a broken bound or a damaged byte would be the same next time, so those end the run at once.
"""

import logging
from typing import Any

from prefect.client.schemas.objects import State, TaskRun
from prefect.task_engine import TaskRunTimeoutError
from prefect.tasks import Task

from glm_quant.errors import GlmQuantError

_log = logging.getLogger("glm_quant.retrying")

_MINUTES = 60
_DELAYS = (2 * _MINUTES, 10 * _MINUTES, 30 * _MINUTES, 120 * _MINUTES)


def retry_policy() -> dict[str, Any]:
    """Return the task options that try again, later and later, what may pass."""
    return {
        "retries": len(_DELAYS),
        "retry_delay_seconds": list(_DELAYS),
        "retry_condition_fn": may_pass,
    }


def may_pass(_task: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Whether a task failed on something that another try, later, may not meet."""
    error = state.result(raise_on_failure=False)
    passing_error = isinstance(error, TaskRunTimeoutError) or (
        isinstance(error, GlmQuantError) and error.may_pass
    )
    if passing_error and run.run_count <= len(_DELAYS):
        minutes = _DELAYS[run.run_count - 1] // _MINUTES
        _log.warning(
            "%s: try %d of %d failed, the next one is in %d minutes: %s",
            run.name,
            run.run_count,
            len(_DELAYS) + 1,
            minutes,
            error,
        )
    return passing_error
