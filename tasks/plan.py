"""The plan task."""

from prefect import task

from glm_quant.build import BuildSpec, open_build
from glm_quant.stages.base import StageResult
from glm_quant.stages.plan import PlanStage
from tasks.caching import on_disk
from tasks.running import run_stage


@task(
    name="plan",
    task_run_name="plan",
    **on_disk(lambda inputs: PlanStage(open_build(inputs["spec"]))),
)
def plan(spec: BuildSpec) -> StageResult:
    """Fix every output byte's place: `glm_quant.stages.plan.PlanStage`."""
    return run_stage(PlanStage(open_build(spec)))
