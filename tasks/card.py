"""The card task."""

from prefect import task

from glm_quant.build import BuildSpec, open_build
from glm_quant.stages.base import StageResult
from glm_quant.stages.card import CardStage
from tasks.caching import on_disk
from tasks.running import run_stage


@task(
    name="card",
    task_run_name="card",
    **on_disk(lambda inputs: CardStage(open_build(inputs["spec"]))),
)
def card(spec: BuildSpec) -> StageResult:
    """Render the model card from records: `glm_quant.stages.card.CardStage`."""
    return run_stage(CardStage(open_build(spec)))
