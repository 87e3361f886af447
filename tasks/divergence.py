"""The divergence task."""

from prefect import task

from glm_quant.build import BuildSpec, open_build
from glm_quant.stages.base import StageResult
from glm_quant.stages.divergence import DivergenceStage
from tasks.caching import on_disk
from tasks.retrying import passing
from tasks.running import run_stage


@task(
    name="divergence",
    task_run_name="divergence",
    **on_disk(lambda inputs: DivergenceStage(open_build(inputs["spec"]))),
    **passing(),
)
def divergence(spec: BuildSpec) -> StageResult:
    """Measure how far the build is from its source: `stages.divergence.DivergenceStage`."""
    return run_stage(DivergenceStage(open_build(spec)))
