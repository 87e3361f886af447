"""The assemble task."""

from prefect import task

from glm_quant.build import BuildSpec, open_build
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.base import StageResult
from tasks.caching import on_disk
from tasks.running import run_stage


@task(
    name="assemble",
    task_run_name="assemble",
    **on_disk(lambda inputs: AssembleStage(open_build(inputs["spec"]))),
)
def assemble(spec: BuildSpec) -> StageResult:
    """Complete the checkpoint around its weights: `glm_quant.stages.assemble.AssembleStage`."""
    return run_stage(AssembleStage(open_build(spec)))
