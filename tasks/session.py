"""What holds for a flow as long as it runs: workspace, results, credentials, logs, progress."""

import logging
from collections.abc import Generator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from uuid import UUID

from prefect import task
from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.filesystems import LocalFileSystem
from prefect.runtime import flow_run

from glm_quant.build import Build, BuildSpec, claimed, workspace_of
from glm_quant.errors import GlmQuantError
from glm_quant.plan_checks import require_plan
from glm_quant.stages.targets import judge_targets
from glm_quant.stages.upload import take_over
from glm_quant.status import STAGES
from tasks.dead import mark_dead_tasks
from tasks.progress import progress_shown
from tasks.retrying import retry_policy
from tasks.secrets import load_secrets

_log = logging.getLogger("glm_quant.session")
_WAY_OUT = (
    "What is finished is kept. When this is corrected, press Retry: only what is left is done."
)


@contextmanager
def build_session(
    spec: BuildSpec, stages: Sequence[str] = STAGES, publishes: bool = False
) -> Generator[Build]:
    """Open a build, hold its workspace and keep Prefect's results in it while the block runs.

    Args:
        spec: which build.
        stages: names of the stages of this flow, in order; progress counts on them.
        publishes: what publishing would refuse is refused now, and the records are those in S3, if
            the spec or the recipe wants them there.

    Raises:
        GlmQuantError: whatever stops the build; the run's page says it too.
    """
    # The setting PREFECT_LOGGING_EXTRA_LOGGERS adds a handler, but leaves the level at WARNING.
    logging.getLogger("glm_quant").setLevel(logging.INFO)
    load_secrets()
    results = workspace_of(spec).results
    with (
        failure_on_run_page(),
        claimed(spec, shared=publishes) as shared_records,
        results_in(results),
        progress_shown(stages),
    ):
        if flow_run.run_count > 1:
            _mark_dead_tasks()  # before a task of this process runs
        with closing(_open(spec, publishes)) as build:
            build.shared_records = shared_records
            yield build


@task(name="open", task_run_name="open", persist_result=False, **retry_policy())
def _open(spec: BuildSpec, publishes: bool) -> Build:
    """Read the recipe and the source's metadata, and plan.

    What measuring and publishing would refuse in the end is refused here.
    """
    build = Build(spec, publishes=publishes)
    require_plan(build)
    if publishes:
        judge_targets(build)
        take_over(build)
    return build


def _mark_dead_tasks() -> None:
    """Mark what an earlier process of this run left unfinished."""
    try:
        with get_client(sync_client=True) as client:
            mark_dead_tasks(client, UUID(str(flow_run.id)))
    except Exception as absent:
        _log.warning("tasks of an earlier process stay as they are: %s", absent)


@contextmanager
def failure_on_run_page() -> Generator[None]:
    """Show on the run's page, in words for a person, why the block failed."""
    try:
        yield
    except (GlmQuantError, TimeoutError) as error:
        text = f"## {type(error).__name__}\n\n{error}\n\n{_WAY_OUT}"
        try:
            create_markdown_artifact(text, key="why-it-stopped", description=str(error))
        except Exception as absent:
            _log.warning("the run's page lacks why it stopped: %s", absent)
        raise


@contextmanager
def results_in(folder: Path) -> Generator[None]:
    """Keep the results of the tasks in the block in a folder, whoever started the flow.

    Prefect takes the place of results from settings or from the decorator, both known before the
    parameters are.
    """
    context = FlowRunContext.get()
    if context is None:
        raise RuntimeError("results_in is for the inside of a flow")
    folder.mkdir(parents=True, exist_ok=True)
    storage = LocalFileSystem(basepath=str(folder))
    store = context.result_store.model_copy(update={"result_storage": storage})
    with context.model_copy(update={"result_store": store}):
        yield
