"""What holds for a flow as long as it runs: workspace, results, credentials, logs, progress."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from prefect.artifacts import create_markdown_artifact
from prefect.context import FlowRunContext
from prefect.filesystems import LocalFileSystem

from glm_quant.build import BuildSpec, claimed, workspace_of
from glm_quant.errors import GlmQuantError
from tasks.progress import shown
from tasks.secrets import load_secrets

_log = logging.getLogger("glm_quant.session")


@contextmanager
def at_work(spec: BuildSpec) -> Generator[None]:
    """Hold a build's workspace and keep Prefect's results in it while the block runs.

    Raises:
        OutputError: the workspace holds something else.
        BusyError: another process works in it.
    """
    # The setting PREFECT_LOGGING_EXTRA_LOGGERS adds a handler, but leaves the level at WARNING.
    logging.getLogger("glm_quant").setLevel(logging.INFO)
    load_secrets()
    with told(), claimed(spec), results_in(workspace_of(spec).results), shown():
        yield


@contextmanager
def told() -> Generator[None]:
    """Show on the run's page, in words for a person, why the block failed."""
    try:
        yield
    except (GlmQuantError, TimeoutError) as error:
        text = f"## {type(error).__name__}\n\n{error}\n\nWhat is finished is kept: press Retry."
        try:
            create_markdown_artifact(text, key="why-it-stopped", description="Why it stopped")
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
