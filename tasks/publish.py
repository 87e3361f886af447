"""The publish task, one a target."""

from collections.abc import Sequence

from prefect import task
from prefect.client.schemas.objects import State

from glm_quant.build import BuildSpec, open_build, targets_of
from glm_quant.errors import PublishError
from glm_quant.stages.base import StageResult
from glm_quant.stages.publish import PublishStage
from tasks.caching import on_disk
from tasks.limits import build_seconds
from tasks.retrying import passing
from tasks.running import run_stage


def _stage(spec: BuildSpec, target: str) -> PublishStage:
    return PublishStage(open_build(spec), target)


@task(
    name="publish",
    task_run_name="publish to {target}",
    **on_disk(lambda inputs: _stage(inputs["spec"], inputs["target"])),
    **passing(),
)
def publish(spec: BuildSpec, target: str) -> StageResult:
    """Publish to one target: `glm_quant.stages.publish.PublishStage`."""
    return run_stage(_stage(spec, target))


def publish_everywhere(spec: BuildSpec) -> list[StageResult]:
    """Publish to every target; one that fails does not keep the others from their build.

    Raises:
        PublishError: some failed; the others are done, and stay so when it is run again.
    """
    targets = targets_of(spec)
    limited = publish.with_options(timeout_seconds=build_seconds(spec)) if targets else publish
    states = [limited(spec, target, return_state=True) for target in targets]
    return results_of(states, targets)


def results_of(states: Sequence[State[StageResult]], targets: Sequence[str]) -> list[StageResult]:
    """Return the results of tasks, one a target.

    Raises:
        PublishError: some failed; names which and why.
    """
    found = [state.result(raise_on_failure=False) for state in states]
    failed = {t: f for t, f in zip(targets, found, strict=True) if isinstance(f, BaseException)}
    if failed:
        told = "; ".join(f"{target}: {error}" for target, error in failed.items())
        raise PublishError(
            f"{len(failed)} of {len(targets)} targets failed, the others are done. Run again: only "
            f"these are left. {told}"
        )
    return [result for result in found if isinstance(result, StageResult)]
