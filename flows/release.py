"""The flow `glm-quant`: from a checkpoint to a published build. It reads as a table of contents."""

from prefect import flow

from glm_quant.build import BuildSpec, claimed
from glm_quant.stages.base import StageResult
from tasks.assemble import assemble
from tasks.card import card
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.parity import parity
from tasks.plan import plan
from tasks.publish import publish_everywhere
from tasks.upload import make_shards, restore_shards


@flow(name="glm-quant", flow_run_name="{spec.recipe}", persist_result=False)
def release(spec: BuildSpec) -> list[StageResult]:
    """Make, prove and publish one build. Run it again after any interruption: it resumes."""
    with claimed(spec):
        return [
            download(spec),
            plan(spec),
            *make_shards(spec),
            assemble(spec),
            *restore_shards(spec),
            parity(spec),
            evaluate(spec),
            card(spec),
            *publish_everywhere(spec),
        ]
