"""The worker, for a machine in a closet: Prefect's own, and a thread that restarts crashed runs.

It may be started again at any time, by a person or by launchd: whatever is there already is left as
it is.
"""

import os
import signal
import subprocess
import sys
from contextlib import ExitStack, suppress
from importlib import metadata
from importlib.resources import as_file, files
from pathlib import Path
from shutil import which

from deployments.server import prefect_command, wait_for_server
from flows.api_address import DEFAULT_API, configured_address, use_address
from flows.environment import HOME_VARIABLE, prepare_service
from glm_quant.artifact import sha256_file
from glm_quant.errors import ServiceError

POOL = "apple-silicon"
# One run of this queue at a time. Not `prefect worker start --limit 1`: watching would wait for
# hours behind a build, and Prefect's worker dies when a run that crashed is due again before it has
# let go of the run's place ("this borrower is already holding one of this ... tokens").
QUEUE = "builds"
# What was deployed last, so that changes a person made in the UI outlive a restart of the worker.
DEPLOYED_VARIABLE = "glm_quant_deployed"


def connect_worker(home: Path) -> None:
    """Wait for the server that this process and its runs talk to.

    Args:
        home: folder that paths in deployments are relative to.

    Raises:
        ServiceError: no server answers.
    """
    os.environ[HOME_VARIABLE] = str(home.expanduser().absolute())
    prepare_service()
    api = configured_address() or DEFAULT_API
    use_address(api)
    wait_for_server(api)


def set_up(pool: str, deployments: Path | None = None) -> list[str]:
    """Make what a worker needs on the server, and mark runs whose process is gone.

    Returns:
        A line for each run that was marked.
    """
    from deployments.automations import install_automation
    from deployments.restarts import mark_dead

    make_pool(pool)
    with ExitStack() as stack:
        shipped = files("deployments").joinpath("prefect.yaml")
        path = deployments or stack.enter_context(as_file(shipped))
        deploy(path)
    install_automation()
    return mark_dead(pool)


def run_prefect_worker(pool: str, once: bool) -> None:
    """Be Prefect's worker; a Mac does not sleep meanwhile."""
    from prefect.cli import app

    from deployments.restarts import keep_restarting

    # Prefect's worker turns SIGTERM into SIGINT, which nohup or a shell's `&` may have set aside.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    caffeinate = which("caffeinate")
    if caffeinate:
        subprocess.Popen([caffeinate, "-is", "-w", str(os.getpid())])
    keep_restarting(pool)
    sys.argv = ["prefect", "worker", "start", "--pool", pool, *(["--run-once"] if once else [])]
    app()


def make_pool(name: str) -> None:
    """Make the work pool and its queue for builds, if there are none."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    pool = WorkPoolCreate(
        name=name,
        type="process",
        description="Runs flows as processes on one machine, by `glm-quant worker`.",
        base_job_template=ProcessWorker.get_default_base_job_template(),
    )
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_pool(pool)
    with get_client(sync_client=True) as client, suppress(ObjectAlreadyExists):
        client.create_work_queue(
            QUEUE, description="One at a time.", concurrency_limit=1, work_pool_name=name
        )


def deploy(path: Path) -> bool:
    """Deploy a prefect.yaml, unless just that was deployed before; returns whether it was.

    Raises:
        ServiceError: Prefect refused it.
    """
    from prefect.variables import Variable

    identity = f"{metadata.version('glm-quant')} {sha256_file(path)}"
    if Variable.get(DEPLOYED_VARIABLE) == identity:
        return False
    done = subprocess.run(
        [*prefect_command(), "--no-prompt", "deploy", "--all", "--prefect-file", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServiceError(
            f"{path}: Prefect did not deploy it:\n{done.stdout[-2000:]}{done.stderr[-2000:]}\n"
            "Correct the file and start again."
        )
    Variable.set(DEPLOYED_VARIABLE, identity, overwrite=True)
    return True
