"""The parity task."""

from prefect import task

from glm_quant.build import BuildSpec, open_build
from glm_quant.stages.base import StageResult
from glm_quant.stages.parity import ParityStage
from tasks.caching import on_disk
from tasks.retrying import passing
from tasks.running import run_stage


@task(
    name="parity",
    task_run_name="parity",
    **on_disk(lambda inputs: ParityStage(open_build(inputs["spec"]))),
    **passing(),
)
def parity(spec: BuildSpec) -> StageResult:
    """Hold the build against the reference: `glm_quant.stages.parity.ParityStage`."""
    return run_stage(ParityStage(open_build(spec)))
