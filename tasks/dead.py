"""Tasks that a dead process left `Running`: the page of its run would show them so for ever."""

from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterId,
    TaskRunFilter,
    TaskRunFilterState,
    TaskRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.states import Crashed

_MESSAGE = "The process that worked on it died."


def mark_dead_tasks(client: SyncPrefectClient, run: UUID) -> None:
    """Mark a run's unfinished tasks as crashed. To be called when no process works on it."""
    unfinished = TaskRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING])
    for task_run in client.read_task_runs(
        flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])),
        task_run_filter=TaskRunFilter(state=TaskRunFilterState(type=unfinished)),
    ):
        client.set_task_run_state(task_run.id, Crashed(message=_MESSAGE), force=True)
