"""The server: Prefect's own, with the settings of this project. It replaces this process."""

import os
import sys
import time

from flows.api_address import answers, save_address
from flows.environment import prepare_service
from glm_quant.errors import ServiceError

# A start on a busy machine migrates the database first.
_SERVER_SECONDS = 300


def run_server(host: str, port: int, save: bool) -> None:
    """Become Prefect's server: the API, the UI, the schedule.

    Args:
        host: address to listen on.
        port: port of the API and the UI.
        save: write the address into the Prefect profile of this user.
    """
    prepare_service()
    api = f"http://{host}:{port}/api"
    # The UI asks this address from the browser; Prefect's default is that of another port.
    os.environ.setdefault("PREFECT_UI_API_URL", api)
    if save:
        save_address(api)
    sys.stdout.flush()
    sys.stderr.flush()
    command = [sys.executable, "-P", "-m", "flows.database", "server", "start"]
    command += ["--host", host, "--port", str(port)]
    # Not a child: signals of launchd or systemd reach Prefect itself.
    os.execv(command[0], command)  # noqa: S606 - our own interpreter


def wait_for_server(api: str, seconds: float = _SERVER_SECONDS) -> None:
    """Wait until the API answers: after a reboot both services start at the same time.

    Raises:
        ServiceError: it does not.
    """
    deadline = time.monotonic() + seconds
    while not answers(api, 10):
        if time.monotonic() > deadline:
            raise ServiceError(
                f"{api}: no Prefect server answered for {seconds:.0f} s. Start one with "
                "`glm-quant server`, or set PREFECT_API_URL to the one to use."
            )
        time.sleep(1)


def prefect_command() -> list[str]:
    """Return Prefect's command line of this very environment."""
    return [sys.executable, "-m", "prefect"]
