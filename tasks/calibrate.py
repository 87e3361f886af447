"""The calibrate task."""

from prefect import task

from glm_quant.build import BuildSpec, open_build
from glm_quant.stages.base import StageResult
from glm_quant.stages.calibrate import CalibrateStage
from tasks.caching import on_disk
from tasks.retrying import passing
from tasks.running import run_stage


@task(
    name="calibrate",
    task_run_name="calibrate",
    **on_disk(lambda inputs: CalibrateStage(open_build(inputs["spec"]))),
    **passing(),
)
def calibrate(spec: BuildSpec) -> StageResult:
    """Measure what each weight's inputs are: `glm_quant.stages.calibrate.CalibrateStage`."""
    return run_stage(CalibrateStage(open_build(spec)))


def calibrate_if_wanted(spec: BuildSpec) -> list[StageResult]:
    """Do it for a recipe that wants it and names no folder of its own."""
    return [calibrate(spec)] if open_build(spec).recipe.own_calibration else []
