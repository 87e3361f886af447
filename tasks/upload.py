"""The upload and restore tasks, and how shards are made and sent."""

import logging

from prefect import task
from prefect.futures import PrefectFuture, wait

from glm_quant.build import BuildSpec, open_build, shards_of
from glm_quant.stages.base import StageResult
from glm_quant.stages.publishing import RestoreStage, UploadStage, early_targets, elsewhere
from tasks.caching import on_disk
from tasks.quantize import quantize
from tasks.retrying import passing
from tasks.running import run_stage

_log = logging.getLogger("glm_quant.upload")


@task(
    name="upload",
    task_run_name="upload-{shard}-{target}",
    **on_disk(
        lambda inputs: UploadStage(open_build(inputs["spec"]), inputs["shard"], inputs["target"])
    ),
)
def upload(spec: BuildSpec, shard: int, target: str) -> StageResult:
    """Bring one shard to one target: `glm_quant.stages.publishing.UploadStage`."""
    return run_stage(UploadStage(open_build(spec), shard, target))


@task(
    name="restore",
    task_run_name="restore-{shard}",
    **on_disk(lambda inputs: RestoreStage(open_build(inputs["spec"]), inputs["shard"])),
    **passing(),
)
def restore(spec: BuildSpec, shard: int) -> StageResult:
    """Fetch one shard back: `glm_quant.stages.publishing.RestoreStage`."""
    return run_stage(RestoreStage(open_build(spec), shard))


def make_shards(spec: BuildSpec) -> list[StageResult]:
    """Make every shard; each is uploaded while the next one is made.

    At most one shard waits for its upload. An upload that fails stops nothing: publishing does it
    again, and says what is wrong.
    """
    made: list[StageResult] = []
    sending: list[PrefectFuture[StageResult]] = []
    for shard in shards_of(spec):
        made.append(quantize(spec, shard))
        wait(sending)
        targets = early_targets(open_build(spec))
        sending = [upload.submit(spec, shard, target) for target in targets]
    wait(sending)
    return made


def restore_shards(spec: BuildSpec) -> list[StageResult]:
    """Fetch back the shards that were let go."""
    return [restore(spec, shard) for shard in elsewhere(open_build(spec))]
