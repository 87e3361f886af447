"""The download task."""

from prefect import task

from glm_quant.build import BuildSpec, open_build
from glm_quant.plan_checks import require_plan
from glm_quant.stages.base import StageResult
from glm_quant.stages.download import DownloadStage
from glm_quant.stages.targets import judge_targets
from glm_quant.stages.upload import take_over
from tasks.retrying import passing
from tasks.running import run_stage


@task(name="download", task_run_name="download", persist_result=False, **passing())
def download(spec: BuildSpec) -> StageResult:
    """Open the source and check that it is whole: `glm_quant.stages.download.DownloadStage`."""
    build = open_build(spec, afresh=True)
    require_plan(build)
    judge_targets(build)
    take_over(build)
    return run_stage(DownloadStage(build))
