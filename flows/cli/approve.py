"""`glm-quant approve`: a person's word from the command line."""

from pathlib import Path
from typing import Annotated, Any, cast
from uuid import UUID

import typer

from flows.cli.terminal import errors_in_one_screen
from glm_quant.errors import InputError


def approve(
    what: Annotated[str, typer.Argument(help="Name or id of a waiting run, or a workspace.")],
    reject: Annotated[bool, typer.Option(help="Say no instead.")] = False,
    note: Annotated[str, typer.Option(help="Why, for the record.")] = "",
) -> None:
    """Let a build be published that waits for a person's word."""
    with errors_in_one_screen():
        if Path(what).is_dir():
            from glm_quant.stages.approval import give_word
            from glm_quant.workspace import Workspace

            give_word(Workspace(Path(what).absolute()), not reject, note)
            typer.echo(f"{what}: recorded. The next run goes on from here.")
            return
        run = _waiting_run(what)
        from prefect.flow_runs import resume_flow_run

        answer = {"approve": not reject, "note": note}
        cast("Any", resume_flow_run)(run.id, run_input=answer)
        typer.echo(f"{run.name}: goes on.")


def _waiting_run(what: str) -> Any:
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
        wanted = FlowRunFilter(state=waits, id=FlowRunFilterId(any_=[UUID(what)]))
    except ValueError:
        wanted = FlowRunFilter(state=waits, name=FlowRunFilterName(any_=[what]))
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(flow_run_filter=wanted)
    if len(found) != 1:
        ids = "".join(f"\n  {run.id}" for run in found)
        raise InputError(
            f"{what}: {len(found)} runs of this name or id wait for a word; give the id of one."
            f"{ids}"
        )
    return found[0]
