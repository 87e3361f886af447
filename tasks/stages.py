"""The tasks, one a stage. Each is called with an opened build, and which part of it."""

from glm_quant.build import Build
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.base import StageResult
from glm_quant.stages.calibrate import CalibrateStage
from glm_quant.stages.card import CardStage
from glm_quant.stages.divergence import AssessDivergenceStage, DivergenceStage
from glm_quant.stages.download import DownloadStage
from glm_quant.stages.evaluate import EvaluationStage
from glm_quant.stages.parity import AssessParityStage, ParityStage
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.publish import PublishStage
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.stages.restore import RestoreStage
from glm_quant.stages.upload import UploadStage
from glm_quant.stages.verify import VerifyStage
from tasks.limits import EVALUATE_SECONDS, build_seconds, shard_seconds
from tasks.stage_task import stage_task

download = stage_task(DownloadStage, "download", cached=False)
plan = stage_task(PlanStage, "plan", retried=False)
calibrate = stage_task(CalibrateStage, "calibrate")
quantize = stage_task(QuantizeStage, "quantize")
# Where an upload fails, the shard is tried again with the next one.
upload = stage_task(UploadStage, "upload", retried=False)
restore = stage_task(
    RestoreStage, "restore", limit=lambda stage: shard_seconds(stage.build, stage.shard)
)
assemble = stage_task(AssembleStage, "assemble", retried=False)
parity = stage_task(ParityStage, "parity")
divergence = stage_task(DivergenceStage, "divergence")
evaluate = stage_task(EvaluationStage, "evaluate", retried=False, limit=lambda _: EVALUATE_SECONDS)
card = stage_task(CardStage, "card", retried=False)
publish = stage_task(PublishStage, "publish", limit=lambda stage: build_seconds(stage.build))

verify = stage_task(VerifyStage, "verify", cached=False)
assess_parity = stage_task(AssessParityStage, "parity")
assess_divergence = stage_task(AssessDivergenceStage, "divergence")


def calibrate_if_wanted(build: Build) -> list[StageResult]:
    """Calibrate for a recipe that wants it and names no folder of its own."""
    return [calibrate(build)] if build.recipe.own_calibration else []
