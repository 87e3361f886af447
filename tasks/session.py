"""What holds for a flow as long as it runs: workspace, results, credentials, logs, progress."""

import logging
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import UUID

from prefect.artifacts import create_markdown_artifact
from prefect.client.orchestration import get_client
from prefect.context import FlowRunContext
from prefect.filesystems import LocalFileSystem
from prefect.runtime import flow_run

from glm_quant.build import BuildSpec, claimed, workspace_of
from glm_quant.errors import GlmQuantError
from glm_quant.status import STAGES
from tasks.dead import mark_dead_tasks
from tasks.progress import shown
from tasks.secrets import load_secrets

_log = logging.getLogger("glm_quant.session")
_WAY_OUT = (
    "What is finished is kept. When this is corrected, press Retry: only what is left is done."
)


@contextmanager
def at_work(
    spec: BuildSpec, stages: Sequence[str] = STAGES, shared: bool = False
) -> Generator[None]:
    """Hold a build's workspace and keep Prefect's results in it while the block runs.

    Args:
        spec: which build.
        stages: names of the stages of this flow, in order; progress counts on them.
        shared: its records are those in S3, if the spec or the recipe wants them there.

    Raises:
        OutputError: the workspace holds something else.
        BusyError: another process works in it.
    """
    # The setting PREFECT_LOGGING_EXTRA_LOGGERS adds a handler, but leaves the level at WARNING.
    logging.getLogger("glm_quant").setLevel(logging.INFO)
    load_secrets()
    results = workspace_of(spec).results
    with told(), claimed(spec, shared), results_in(results), shown(stages):
        if flow_run.run_count > 1:
            _mark_dead_tasks()
        yield


def _mark_dead_tasks() -> None:
    """Mark what an earlier process of this run left unfinished."""
    try:
        with get_client(sync_client=True) as client:
            mark_dead_tasks(client, UUID(str(flow_run.id)))
    except Exception as absent:
        _log.warning("tasks of an earlier process stay as they are: %s", absent)


@contextmanager
def told() -> Generator[None]:
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
