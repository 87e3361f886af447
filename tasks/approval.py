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

from glm_quant.build import Build, BuildSpec, open_build
from glm_quant.errors import ApprovalError
from glm_quant.stages.approving import give_word, last_word, needs_approval, question, refused

_WEEK_SECONDS = 7 * 24 * 3600


class Approval(RunInput):
    """A person's answer: the form in the UI, or `glm-quant approve`."""

    approve: bool = Field(description="publish the build")
    note: str = Field(default="", description="why, for the record")


def approval(spec: BuildSpec) -> None:
    """Go on at once if a person's word is there or nobody wants it; else ask and stop.

    Raises:
        ApprovalError: the answer was no, or this run cannot wait for one.
    """
    build = open_build(spec)
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
    answer = _ask(build, text)
    give_word(build.workspace, answer.approve, answer.note)
    if not answer.approve:
        raise refused(build, answer.note)


def _ask(build: Build, text: str) -> Approval:
    """Return the answer; the first time through, end this process instead.

    A key that was used is never asked again, so each question has its own: the answers so far and
    the questions that nobody answered count.
    """
    said = last_word(build.workspace)
    form = Approval.with_initial_data(description=text)
    for number in count(said.answers if said else 0):
        try:
            return suspend_flow_run(
                wait_for_input=form, timeout=_WEEK_SECONDS, key=f"approval-{flow_run.id}-{number}"
            )
        except ValidationError:  # the question was asked before and nobody answered
            continue
    raise AssertionError("unreachable: count() does not end")
