"""The evaluate task."""

from prefect import task

from glm_quant.build import BuildSpec, open_build
from glm_quant.stages.base import StageResult
from glm_quant.stages.evaluate import EvaluationStage
from tasks.caching import on_disk
from tasks.limits import EVALUATE_SECONDS
from tasks.running import run_stage


@task(
    name="evaluate",
    task_run_name="evaluate",
    timeout_seconds=EVALUATE_SECONDS,
    **on_disk(lambda inputs: EvaluationStage(open_build(inputs["spec"]))),
)
def evaluate(spec: BuildSpec) -> StageResult:
    """Measure the build: `glm_quant.stages.evaluate.EvaluationStage`."""
    return run_stage(EvaluationStage(open_build(spec)))
