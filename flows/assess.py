"""The flow `glm-quant-assess`: judge a finished build, whoever made it."""

from prefect import flow

from glm_quant.build import AssessSpec
from glm_quant.stages.base import ASSESS_STAGES, StageResult
from tasks.naming import assess_name
from tasks.report import report_assessment
from tasks.session import build_session
from tasks.stages import assess_divergence, assess_parity, evaluate, verify


@flow(name="glm-quant-assess", flow_run_name=assess_name, persist_result=False)
def assess(spec: AssessSpec) -> list[StageResult]:
    """Check every byte of a build, compare it with its source, measure it."""
    with build_session(spec.build(), ASSESS_STAGES) as build:
        results = [verify(build), assess_parity(build)]
        results += [assess_divergence(build), evaluate(build)]
        report_assessment(build)
        return results
