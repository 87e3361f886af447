"""The flow `glm-quant-assess`: judge a finished build, whoever made it."""

from prefect import flow

from glm_quant.build import AssessSpec
from glm_quant.stages.base import ASSESS_STAGES, StageResult
from tasks.assess import assess_divergence, assess_evaluation, assess_parity, assess_verify
from tasks.naming import assess_name
from tasks.report import report_assessment
from tasks.session import at_work


@flow(name="glm-quant-assess", flow_run_name=assess_name, persist_result=False)
def assess(spec: AssessSpec) -> list[StageResult]:
    """Check every byte of a build, hold it against its source, measure it."""
    build = spec.build()
    with at_work(build, ASSESS_STAGES):
        done = [assess_verify(build), assess_parity(build)]
        done += [assess_divergence(build), assess_evaluation(build)]
        report_assessment(build)
        return done
