"""The flow `glm-quant`: from a checkpoint to a published build. It reads as a table of contents."""

from prefect import flow

from glm_quant.build import BuildSpec
from glm_quant.stages.base import StageResult
from tasks.approval import approval
from tasks.assemble import assemble
from tasks.calibrate import calibrate_if_wanted
from tasks.card import card
from tasks.divergence import divergence
from tasks.download import download
from tasks.evaluate import evaluate
from tasks.naming import release_name
from tasks.parity import parity
from tasks.plan import plan
from tasks.publish import publish_everywhere
from tasks.report import report_build, report_links, report_plan
from tasks.session import at_work
from tasks.upload import make_shards, restore_shards


@flow(name="glm-quant", flow_run_name=release_name, persist_result=False)
def release(spec: BuildSpec) -> list[StageResult]:
    """Make, prove and publish one build. Run it again after any interruption: it resumes."""
    with at_work(spec, shared=True):
        planned = [download(spec), plan(spec)]
        report_plan(spec)
        measured = calibrate_if_wanted(spec)
        made = [*make_shards(spec), assemble(spec), *restore_shards(spec)]
        proved = [parity(spec), divergence(spec), evaluate(spec), card(spec)]
        report_build(spec)
        approval(spec)
        published = publish_everywhere(spec)
        report_links(spec)
        return [*planned, *measured, *made, *proved, *published]
