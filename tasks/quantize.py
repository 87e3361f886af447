"""The quantize task."""

from prefect import task

from glm_quant.build import BuildSpec, open_build
from glm_quant.stages.base import StageResult
from glm_quant.stages.quantize import QuantizeStage
from tasks.caching import on_disk
from tasks.naming import quantize_name
from tasks.retrying import passing
from tasks.running import run_stage


def _stage(spec: BuildSpec, shard: int) -> QuantizeStage:
    return QuantizeStage(open_build(spec), shard)


@task(
    name="quantize",
    task_run_name=quantize_name,
    **on_disk(lambda inputs: _stage(inputs["spec"], inputs["shard"])),
    **passing(),
)
def quantize(spec: BuildSpec, shard: int) -> StageResult:
    """Complete one output shard: `glm_quant.stages.quantize.QuantizeStage`."""
    return run_stage(_stage(spec, shard))
