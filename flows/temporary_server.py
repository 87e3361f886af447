"""The Prefect server of a command for which none runs: a process that ends with the command.

Prefect itself would start one in the process group of the command. There ^C in a terminal ends that
server first, and the command waits minutes for its answers; and a command that is killed leaves it
behind. This one leads a session of its own and ends when the command is gone.
"""

import atexit
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO

from glm_quant.artifact import disk_errors_named
from glm_quant.children import end_child, end_with_parent, note_child
from glm_quant.errors import ServiceError

# The first start on a fresh PREFECT_HOME migrates its database.
_START_SECONDS = 300
# It takes down the last events of the run before it ends; after this it is killed.
_END_SECONDS = 3.0


def require_home() -> Path:
    """Return the folder PREFECT_HOME, made if it is missing, before Prefect is imported.

    Raises:
        OutputError: it cannot be written.
    """
    home = Path(os.environ.get("PREFECT_HOME") or "~/.prefect").expanduser()
    if not os.environ.get("PREFECT_API_URL"):
        with disk_errors_named(home):
            home.mkdir(parents=True, exist_ok=True)
    return home


def start_server() -> Callable[[], None]:
    """Start a server for Prefect in this process, unless one is set.

    Returns:
        What waits until the server answers; it raises ServiceError when the server does not start.

    Raises:
        OutputError: PREFECT_HOME, where the server keeps its database, cannot be written.
    """
    home = require_home()
    from prefect.context import refresh_global_settings_context
    from prefect.settings import PREFECT_API_URL

    if PREFECT_API_URL.value():
        return lambda: None
    with disk_errors_named(home):
        tempfile.TemporaryFile(dir=home).close()
    words: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - the server's, as long as it runs
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        server = _start(listener.fileno(), words)
    os.environ["PREFECT_API_URL"] = address
    refresh_global_settings_context()
    return lambda: _wait(server, address, words)


def _start(descriptor: int, words: IO[bytes]) -> "subprocess.Popen[bytes]":
    """Start a server on a socket that listens; it ends with this process."""
    marks = {
        "PREFECT_UI_ENABLED": "0",
        # As Prefect marks its own temporary server: no schedules, no late runs.
        "PREFECT__SERVER_EPHEMERAL": "1",
        "PREFECT__SERVER_FINAL": "1",
    }
    server = subprocess.Popen(
        [sys.executable, "-m", "flows.temporary_server", str(descriptor)],
        stdin=subprocess.PIPE,
        stdout=words,
        stderr=words,
        pass_fds=[descriptor],
        start_new_session=True,
        env=os.environ | marks,
    )
    note_child(server)
    # Prefect sends its last log lines and events when threads end, which is before this.
    atexit.register(end_child, server, _END_SECONDS)
    return server


def _wait(server: "subprocess.Popen[bytes]", address: str, words: IO[bytes]) -> None:
    import httpx

    deadline = time.monotonic() + _START_SECONDS
    while server.poll() is None and time.monotonic() < deadline:
        try:
            # No proxy: the environment's is for other machines.
            if httpx.get(f"{address}/health", timeout=5, trust_env=False).is_success:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    words.seek(0)
    lines = words.read().decode(errors="replace").strip().splitlines() or ["(nothing)"]
    raise ServiceError(
        f"The Prefect server of this command did not start; its last words: {lines[-1].strip()}. "
        "It keeps its database in the folder PREFECT_HOME (default: ~/.prefect), which must be "
        "writable. Set PREFECT_HOME to another folder, or PREFECT_API_URL to a running server."
    )


def _serve(descriptor: int) -> None:
    """Be the server, on a socket that listens already, until the parent is gone."""
    import uvicorn

    from flows.database import wait_for_locks

    wait_for_locks()
    config = uvicorn.Config(
        "prefect.server.api.server:create_app", factory=True, log_level="error", lifespan="on"
    )
    server = uvicorn.Server(config)

    def end() -> None:
        server.should_exit = True
        threading.Event().wait(2 * _END_SECONDS)
        os._exit(1)

    end_with_parent(end)
    server.run(sockets=[socket.socket(fileno=descriptor)])


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
