"""Runs that died: marked when their process is gone, and started again if their deployment says so.

After a power cut, or a worker that was stopped, the server has no way to know: such a run would say
`Running` for ever, hold its place in the queue, and could not be retried. One machine serves a
pool, so at its start a run of the pool lives here, having outlived its worker, or is dead.

Restarts are looked for, not triggered by the event of the crash: Prefect reports a crash twice,
seconds apart, and the second report would end the run that is starting again.
"""

import contextvars
import logging
import os
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    FlowRunFilterTags,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.states import AwaitingRetry, Crashed

from glm_quant.build import DEFAULT_RESTARTS
from tasks.dead import mark_dead_tasks

RESTART_TAG = "auto-restart"
RESTART_MESSAGE = "The run crashed and starts again by itself."
_UNFINISHED = [StateType.RUNNING, StateType.PENDING, StateType.CANCELLING]
# Nobody wants a run to come back that crashed long ago.
_TOO_OLD = timedelta(days=1)
_SECONDS_BETWEEN_LOOKS = 5.0
_PAGE = 200

_log = logging.getLogger("glm_quant.restarts")


def mark_dead(pool: str) -> list[str]:
    """Mark the pool's dead runs as crashed, before its worker starts; returns a line for each."""
    lines: list[str] = []
    with get_client(sync_client=True) as client:
        for run in _runs(client, pool, _UNFINISHED):
            cause = _cause_of_death(run)
            if cause:
                client.set_flow_run_state(run.id, Crashed(message=cause), force=True)
                mark_dead_tasks(client, run.id)
                lines.append(f"{run.name}: {cause}")
    return lines


def keep_restarting(pool: str) -> None:
    """Start crashed runs of the pool again, in a thread, for as long as this process lives."""
    context = contextvars.copy_context()
    threading.Thread(target=context.run, args=(_keep_restarting, pool), daemon=True).start()


def restart_crashed(pool: str, calm_seconds: float) -> list[str]:
    """Schedule what crashed, was quiet since, and may start again; returns the runs' names."""
    names: list[str] = []
    with get_client(sync_client=True) as client:
        for run in _runs(client, pool, [StateType.CRASHED], RESTART_TAG):
            if run.state is None or _is_alive(run):
                continue
            age = datetime.now(UTC) - run.state.timestamp
            states = client.read_flow_run_states(run.id)
            allowed = run.parameters.get("spec", {}).get("restarts", DEFAULT_RESTARTS)
            quiet = timedelta(seconds=calm_seconds) < age < _TOO_OLD
            if quiet and automatic_starts(states) < allowed:
                state = AwaitingRetry(message=RESTART_MESSAGE)
                client.set_flow_run_state(run.id, state, force=True)
                names.append(run.name)
    return names


def close_crashed(pool: str, closed: set[UUID]) -> None:
    """Mark the tasks of crashed runs of the pool, but of those in `closed`, which grows."""
    with get_client(sync_client=True) as client:
        for run in _runs(client, pool, [StateType.CRASHED]):
            if run.state is None or run.state.id in closed or _is_alive(run):
                continue
            mark_dead_tasks(client, run.id)
            closed.add(run.state.id)


def automatic_starts(states: Sequence[State]) -> int:
    """Return how often a run started by itself since a person last started it."""
    starts = [s for s in sorted(states, key=lambda s: s.timestamp) if s.is_scheduled()]
    count = 0
    for state in reversed(starts):
        if state.message != RESTART_MESSAGE:
            break
        count += 1
    return count


def is_flow_process(pid: int) -> bool:
    """Whether a process lives and is Prefect's: after a reboot its number may be another's."""
    done = subprocess.run(
        ["ps", "-o", "stat=,command=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    state, _, command = done.stdout.strip().partition(" ")
    return bool(state) and not state.startswith("Z") and "prefect" in command


def _keep_restarting(pool: str) -> None:
    calm_seconds = float(os.environ["GLM_QUANT_RESTART_SECONDS"])
    closed: set[UUID] = set()
    while True:
        try:
            close_crashed(pool, closed)
            for name in restart_crashed(pool, calm_seconds):
                _log.info("%s: %s", name, RESTART_MESSAGE)
        except Exception as error:  # the server is away; the next look may find it
            _log.info("no look for crashed runs: %s", type(error).__name__)
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def _runs(
    client: SyncPrefectClient, pool: str, types: list[StateType], tag: str | None = None
) -> list[FlowRun]:
    states = FlowRunFilterState(type=FlowRunFilterStateType(any_=types))
    return client.read_flow_runs(
        flow_run_filter=FlowRunFilter(
            state=states, tags=FlowRunFilterTags(all_=[tag]) if tag else None
        ),
        work_pool_filter=WorkPoolFilter(name=WorkPoolFilterName(any_=[pool])),
        limit=_PAGE,
    )


def _cause_of_death(run: FlowRun) -> str | None:
    """Return why a run must be dead, or None if it lives or lives elsewhere."""
    if not run.infrastructure_pid:
        return "The worker ended before the run's process began."
    if _is_alive(run):
        return None
    return f"Process {run.infrastructure_pid} is gone: it was killed, or the machine restarted."


def _is_alive(run: FlowRun) -> bool:
    """Whether the run's process lives, as far as can be seen from this machine."""
    host, _, number = (run.infrastructure_pid or "").rpartition(":")
    if host and host != socket.gethostname():
        return True
    return bool(number) and is_flow_process(int(number))
