"""`glm-quant approve`: a person's word from the command line."""

from pathlib import Path
from typing import Annotated, Any, cast
from uuid import UUID

import typer

from flows.api_address import connect
from flows.cli.terminal import errors_in_one_screen
from flows.environment import prepare
from glm_quant.errors import InputError


def approve(
    place: Annotated[str, typer.Argument(help="Name or id of a waiting run, or a workspace.")],
    reject: Annotated[bool, typer.Option(help="Say no instead.")] = False,
    note: Annotated[str, typer.Option(help="Why, for the record.")] = "",
) -> None:
    """Let a build be published that waits for a person's word."""
    with errors_in_one_screen():
        if Path(place).is_dir():
            from glm_quant.stages.approval import give_word
            from glm_quant.workspace import Workspace

            give_word(Workspace(Path(place).absolute()), not reject, note)
            typer.echo(f"{place}: recorded. The next run goes on from here.")
            return
        prepare()
        connect()
        run = _waiting_run(place)
        from prefect.flow_runs import resume_flow_run

        answer = {"approve": not reject, "note": note}
        cast("Any", resume_flow_run)(run.id, run_input=answer)
        typer.echo(f"{run.name}: goes on.")


def _waiting_run(name: str) -> Any:
    """Return the one run with this name or id that waits.

    Raises:
        InputError: there is none, or more than one.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterId,
        FlowRunFilterName,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType

    waits = FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PAUSED]))
    try:
        criteria = FlowRunFilter(state=waits, id=FlowRunFilterId(any_=[UUID(name)]))
    except ValueError:
        criteria = FlowRunFilter(state=waits, name=FlowRunFilterName(any_=[name]))
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(flow_run_filter=criteria)
    if len(runs) != 1:
        ids = "".join(f"\n  {run.id}" for run in runs)
        raise InputError(
            f"{name}: {len(runs)} runs of this name or id wait for a word; give the id of one.{ids}"
        )
    return runs[0]
