"""A stage as a Prefect task: its name, cache key, retries, time limit and progress.

A task is called with the stage itself, which holds the opened build. Prefect neither stores nor
hashes it: the cache key is the stage's fingerprint, and the result is a small `StageResult`.
"""

import logging
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from prefect import task
from prefect.runtime import task_run

from glm_quant.artifact import Record
from glm_quant.stages.base import Stage, StageResult
from tasks.caching import on_disk
from tasks.progress import progress_of
from tasks.retrying import retry_policy

_log = logging.getLogger("glm_quant.stages")

P = ParamSpec("P")
R = TypeVar("R", bound=Record)


def stage_task(
    make_stage: Callable[P, Stage[R]],
    name: str,
    *,
    cached: bool = True,
    retried: bool = True,
    limit: Callable[[Stage[R]], float] | None = None,
) -> Callable[P, StageResult]:
    """Return a function that runs a stage as a task of the flow that calls it.

    Args:
        make_stage: the stage's class: called with an opened build, and which part of it.
        name: of the task.
        cached: the task is skipped, and shown as `Cached`, where the stage's outputs stand on disk.
        retried: what may pass by itself is tried again, over hours.
        limit: seconds after which the task is ended.
    """
    options: dict[str, Any] = on_disk() if cached else {"persist_result": False}
    if retried:
        options |= retry_policy()

    @task(name=name, task_run_name=_stage_title, **options)
    def run(stage: Stage[R]) -> StageResult:
        result = stage.run(progress_of(stage))
        _log.info("%s: %s", result.stage, result.summary)
        return result

    def run_stage(*args: P.args, **kwargs: P.kwargs) -> StageResult:
        stage = make_stage(*args, **kwargs)
        limited = run if limit is None else run.with_options(timeout_seconds=limit(stage))
        return limited(stage)

    return run_stage


def _stage_title() -> str:
    return task_run.parameters["stage"].title
