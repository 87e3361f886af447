"""The tasks that judge a finished build."""

from prefect import task

from glm_quant.build import BuildSpec, open_build
from glm_quant.plan_checks import require_plan
from glm_quant.stages.base import StageResult
from glm_quant.stages.divergence import AssessDivergenceStage
from glm_quant.stages.evaluate import EvaluationStage
from glm_quant.stages.parity import AssessParityStage
from glm_quant.stages.verify import VerifyStage
from tasks.caching import on_disk
from tasks.limits import EVALUATE_SECONDS
from tasks.retrying import passing
from tasks.running import run_stage


@task(name="verify", task_run_name="verify", persist_result=False, **passing())
def assess_verify(spec: BuildSpec) -> StageResult:
    """Check every byte again: `glm_quant.stages.verify.VerifyStage`."""
    build = open_build(spec, afresh=True)
    require_plan(build)
    return run_stage(VerifyStage(build))


@task(
    name="parity",
    task_run_name="parity",
    **on_disk(lambda inputs: AssessParityStage(open_build(inputs["spec"]))),
    **passing(),
)
def assess_parity(spec: BuildSpec) -> StageResult:
    """Hold it against the reference: `glm_quant.stages.parity.AssessParityStage`."""
    return run_stage(AssessParityStage(open_build(spec)))


@task(
    name="divergence",
    task_run_name="divergence",
    **on_disk(lambda inputs: AssessDivergenceStage(open_build(inputs["spec"]))),
    **passing(),
)
def assess_divergence(spec: BuildSpec) -> StageResult:
    """Measure how far it is from its source: `AssessDivergenceStage`."""
    return run_stage(AssessDivergenceStage(open_build(spec)))


@task(
    name="evaluate",
    task_run_name="evaluate",
    timeout_seconds=EVALUATE_SECONDS,
    **on_disk(lambda inputs: EvaluationStage(open_build(inputs["spec"]))),
)
def assess_evaluation(spec: BuildSpec) -> StageResult:
    """Measure it: `glm_quant.stages.evaluate.EvaluationStage`."""
    return run_stage(EvaluationStage(open_build(spec)))
