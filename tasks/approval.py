"""Asking a person before publishing. The run ends its process and waits on the server's side.

Nothing is lost if nobody answers: the run fails after a week, and the same run retried, or another
one, finds everything finished and asks again.
"""

from itertools import count

from prefect.artifacts import create_markdown_artifact
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import deployment, flow_run
from pydantic import Field, ValidationError

from glm_quant.build import Build
from glm_quant.errors import ApprovalError
from glm_quant.stages.approval import (
    give_word,
    identity,
    last_word,
    needs_approval,
    question,
    refused,
)

_WEEK_SECONDS = 7 * 24 * 3600


class Approval(RunInput):
    """A person's answer: the form in the UI, or `glm-quant approve`."""

    approve: bool = Field(description="publish the build")
    note: str = Field(default="", description="why, for the record")


def wait_for_approval(build: Build) -> None:
    """Go on at once if a person's word is there or nobody wants it; else ask and stop.

    Raises:
        ApprovalError: the answer was no, or this run cannot wait for one.
    """
    if not needs_approval(build):
        return
    text = question(build)
    create_markdown_artifact(text, key="approval", description="To be answered")
    if not deployment.id:
        raise ApprovalError(
            f"{build.recipe.name}: publishing needs a person's word. Look at "
            f"{build.workspace.checkpoint}, say `glm-quant approve {build.workspace.root}`, and "
            "run the same command again."
        )
    answer, asked = _ask(build, text)
    give_word(build.workspace, answer.approve, answer.note, asked)
    if not answer.approve:
        raise refused(build, answer.note)


def _ask(build: Build, text: str) -> tuple[Approval, int]:
    """Return the answer and the questions so far; the first time through, end this process instead.

    A key that was used is never asked again and keeps its answer, so each question has its own: of
    these bytes, and counting questions that were answered and questions that nobody answered.
    """
    said = last_word(build.workspace)
    form = Approval.with_initial_data(description=text)
    about = f"approval-{flow_run.id}-{identity(build.workspace)[:12]}"
    for number in count(said.asked if said else 0):
        try:
            answer = suspend_flow_run(
                wait_for_input=form, timeout=_WEEK_SECONDS, key=f"{about}-{number}"
            )
            return answer, number + 1
        except ValidationError:  # the question was asked before and nobody answered
            continue
    raise AssertionError("unreachable: count() does not end")
