"""What holds for a flow as long as it runs: workspace, results, credentials, logs, progress."""

import logging
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from prefect.context import FlowRunContext
from prefect.filesystems import LocalFileSystem

from glm_quant.build import BuildSpec, claimed, workspace_of
from tasks.progress import shown
from tasks.secrets import load_secrets


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
    with claimed(spec), results_in(workspace_of(spec).results), shown():
        yield


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
