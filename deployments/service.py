"""The service: `glm-quant server` and `glm-quant worker`, for a machine in a closet.

`worker` may be started again at any time, by a person or by launchd: whatever is there already is
left as it is. Then it is Prefect's own worker, and beside it a thread that restarts crashed runs.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from importlib import metadata
from importlib.resources import as_file, files
from pathlib import Path
from shutil import which
from typing import Annotated
from urllib.parse import urlsplit

import typer

from flows.cli.terminal import errors_in_one_screen
from flows.environment import HOME_VARIABLE, prepare_service
from glm_quant.artifact import sha256_file
from glm_quant.errors import ServiceError

POOL = "apple-silicon"
# One run of this queue at a time. Not `prefect worker start --limit 1`: watching would wait for
# hours behind a build, and Prefect 3.8's worker dies when a run that crashed is due again before it
# has let go of the run's place ("this borrower is already holding one of this ... tokens").
QUEUE = "builds"
DEFAULT_API = "http://127.0.0.1:4200/api"
# What was deployed last, so that changes a person made in the UI outlive a restart of the worker.
DEPLOYED_VARIABLE = "glm_quant_deployed"
_SERVER_SECONDS = 300


def server(
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port of the API and the UI.")] = 4200,
) -> None:
    """Run Prefect's server: the API, the UI, the schedule. Stays in the foreground."""
    prepare_service()
    # The UI asks this address from the browser; Prefect's default is that of another port.
    os.environ.setdefault("PREFECT_UI_API_URL", f"http://{host}:{port}/api")
    typer.echo(f"The UI: http://{host}:{port}. Next: `glm-quant worker`.", err=True)
    _become([*_prefect(), "server", "start", "--host", host, "--port", str(port)])


def worker(
    home: Annotated[
        Path, typer.Option(help="Folder that paths in deployments are relative to.")
    ] = Path(),
    deployments: Annotated[
        Path | None, typer.Option(help="A prefect.yaml of your own instead of the shipped one.")
    ] = None,
    pool: Annotated[str, typer.Option(help="Work pool, made if it is missing.")] = POOL,
    once: Annotated[bool, typer.Option(help="Run what is due now, then end.")] = False,
) -> None:
    """Make pool, deployments and automation, mark dead runs, then run one build at a time."""
    os.environ[HOME_VARIABLE] = str(home.expanduser().absolute())
    prepare_service()
    from prefect.settings import PREFECT_API_URL, temporary_settings

    api = PREFECT_API_URL.value() or DEFAULT_API
    os.environ["PREFECT_API_URL"] = api  # for the processes of the runs
    with errors_in_one_screen(), temporary_settings({PREFECT_API_URL: api}):
        wait_for_server(api)
        set_up(pool, deployments)
        _work(pool, once)


def _work(pool: str, once: bool) -> None:
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


def set_up(pool: str, deployments: Path | None = None) -> None:
    """Make what a worker needs on the server, and mark runs whose process is gone."""
    from deployments.automations import install_automation
    from deployments.restarts import mark_dead

    make_pool(pool)
    with ExitStack() as stack:
        shipped = files("deployments").joinpath("prefect.yaml")
        path = deployments or stack.enter_context(as_file(shipped))
        deploy(path)
    install_automation()
    for said in mark_dead(pool):
        typer.echo(said, err=True)


def wait_for_server(api: str, seconds: float = _SERVER_SECONDS) -> None:
    """Wait until the API answers: after a reboot both services start at the same time.

    Raises:
        ServiceError: it does not.
    """
    import httpx

    deadline = time.monotonic() + seconds
    while True:
        try:
            if httpx.get(f"{api}/health", timeout=10, trust_env=not _is_local(api)).is_success:
                return
        except httpx.HTTPError:
            pass
        if time.monotonic() > deadline:
            raise ServiceError(
                f"{api}: no Prefect server answered for {seconds:.0f} s. Start one with "
                "`glm-quant server`, or set PREFECT_API_URL to the one to use."
            )
        time.sleep(1)


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

    wanted = f"{metadata.version('glm-quant')} {sha256_file(path)}"
    if Variable.get(DEPLOYED_VARIABLE) == wanted:
        return False
    done = subprocess.run(
        [*_prefect(), "--no-prompt", "deploy", "--all", "--prefect-file", str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise ServiceError(
            f"{path}: Prefect did not deploy it:\n{done.stdout[-2000:]}{done.stderr[-2000:]}\n"
            "Correct the file and start again."
        )
    Variable.set(DEPLOYED_VARIABLE, wanted, overwrite=True)
    return True


def _is_local(api: str) -> bool:
    return urlsplit(api).hostname in ("127.0.0.1", "localhost", "::1")


def _prefect() -> list[str]:
    """Return Prefect's command line of this very environment."""
    return [sys.executable, "-m", "prefect"]


def _become(command: Sequence[str]) -> None:
    """Replace this process: signals of launchd or systemd then reach Prefect itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(command[0], list(command))  # noqa: S606 - our own interpreter
