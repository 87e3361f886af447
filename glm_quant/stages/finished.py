"""Whether a build has anything left to do, from its records alone."""

from collections.abc import Iterator
from typing import Any

from glm_quant.build import Build
from glm_quant.stages.approval import needs_approval
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.base import Stage, StageResult
from glm_quant.stages.calibrate import CalibrateStage
from glm_quant.stages.card import CardStage
from glm_quant.stages.divergence import DivergenceStage
from glm_quant.stages.download import DownloadStage
from glm_quant.stages.evaluate import EvaluationStage
from glm_quant.stages.parity import ParityStage
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.publish import PublishStage
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.stages.restore import elsewhere


def finished_results(build: Build) -> list[StageResult] | None:
    """Return what each stage of a build came to if all are done, else None.

    Nothing is made, and no byte of a weight is read; targets that are no folders are asked.
    """
    results: list[StageResult] = []
    for stage in _stages(build):
        record = stage.current()
        if record is None:
            return None
        summary = stage.summarize(record)
        results.append(
            StageResult(stage=stage.name, fingerprint=record.fingerprint, summary=summary)
        )
    # Asked last: there must be a build to have an opinion on, and shards to be elsewhere.
    return None if needs_approval(build) or elsewhere(build) else results


def _stages(build: Build) -> Iterator[Stage[Any]]:
    """Yield the stages in the order of the flow, each only when those before it are done."""
    yield DownloadStage(build)
    yield PlanStage(build)
    if build.recipe.own_calibration:
        yield CalibrateStage(build)
    for shard in range(len(build.plan.shards)):
        yield QuantizeStage(build, shard)
    for stage in (AssembleStage, ParityStage, DivergenceStage, EvaluationStage, CardStage):
        yield stage(build)
    for target in build.targets:
        yield PublishStage(build, target)
