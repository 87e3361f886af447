"""The flow `glm-quant`: from a checkpoint to a published build. It reads as a table of contents."""

from prefect import flow

from glm_quant.build import BuildSpec
from glm_quant.stages.base import StageResult
from tasks.approval import wait_for_approval
from tasks.naming import release_name
from tasks.publish import publish_everywhere
from tasks.report import report_build, report_links, report_plan
from tasks.session import build_session
from tasks.stages import (
    assemble,
    calibrate_if_wanted,
    card,
    divergence,
    download,
    evaluate,
    parity,
    plan,
)
from tasks.upload import make_shards, restore_shards


@flow(name="glm-quant", flow_run_name=release_name, persist_result=False)
def release(spec: BuildSpec) -> list[StageResult]:
    """Make, prove and publish one build. Run it again after any interruption: it resumes."""
    with build_session(spec, publishes=True) as build:
        results = [download(build), plan(build)]
        report_plan(build)
        results += calibrate_if_wanted(build)
        results += [*make_shards(build), assemble(build), *restore_shards(build)]
        results += [parity(build), divergence(build), evaluate(build), card(build)]
        report_build(build)
        wait_for_approval(build)
        results += publish_everywhere(build)
        report_links(build)
        return results
