"""A Prefect server and a worker as a user starts them, to be killed and started again."""

import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx

from deployments.restarts import is_flow_process
from tests.e2e.command_line import CommandLine

SLOW_MACHINE_SECONDS = 240
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED", "PAUSED")


def wait_for(what: Callable[[], Any], why: str, seconds: float = SLOW_MACHINE_SECONDS) -> Any:
    """Wait until `what` returns something true, and return it."""
    deadline = time.monotonic() + seconds
    while True:
        result = what()
        if result:
            return result
        assert time.monotonic() < deadline, f"after {seconds:.0f} s: {why}"
        time.sleep(0.1)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it started in its group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


# Faults of Prefect that are not ours to mend and do no harm; the tests that meet them kill servers.
# A run whose connection broke sends its last events again. Where the server has all of a batch,
# Prefect 3.9.1 inserts an empty row, which the database refuses.
KNOWN_FAULTS = ("NOT NULL constraint failed: events.occurred",)


def tracebacks(log: Path) -> list[str]:
    """Return each traceback in a log, from the line before it to the line that names its error."""
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    blocks: list[str] = []
    for number, line in enumerate(lines):
        if "Traceback (most recent call last)" in line:
            last = number + 1
            while last < len(lines) and (not lines[last] or lines[last][0] in " |+"):
                last += 1
            block = "\n".join(lines[max(number - 1, 0) : last + 1])
            if not any(fault in block for fault in KNOWN_FAULTS):
                blocks.append(block)
    return blocks


class Server:
    """`glm-quant server` in a home of its own; the address stays over restarts.

    The commands of this home find it as a user's do: the server writes its address, which is not
    the default one, into the home's Prefect profile.
    """

    def __init__(self, command_line: CommandLine) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.command_line = command_line
        del command_line.environment["PREFECT_API_URL"]
        self.log = command_line.home / "server.log"
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start it, and leave it to others to wait for it."""
        with self.log.open("ab") as log:
            options = "--port", str(self.port), "--save-address"
            self._process = self.command_line.start("server", *options, output=log)

    def start(self) -> None:
        self.begin()
        wait_for(self.answers, "the Prefect server did not start")

    def answers(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the Prefect server ended"
        try:
            return httpx.get(f"{self.api}/health", timeout=5).is_success
        except httpx.HTTPError:
            return False

    def kill(self) -> None:
        if self._process:
            kill(self._process)

    def lock_database(self, seconds: float) -> None:
        """Write to the database as another process does, and keep its lock for so long."""
        path = self.command_line.prefect_home / "prefect.db"
        with closing(sqlite3.connect(path, timeout=SLOW_MACHINE_SECONDS)) as connection:
            connection.execute("UPDATE flow SET updated = updated")
            time.sleep(seconds)
            connection.commit()


class Service:
    """A worker at a server, and what a person does with them: run, look, retry, cancel."""

    def __init__(self, server: Server, command_line: CommandLine, home: Path) -> None:
        self.server = server
        self.command_line = command_line
        self.home = home
        self.log = home.with_name("worker.log")
        self._worker: subprocess.Popen[bytes] | None = None

    def start_worker(self) -> None:
        """Start `glm-quant worker` and wait until it polls."""
        self.home.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            begin = log.tell()
            self._worker = self.command_line.start("worker", "--home", self.home, output=log)
        wait_for(
            lambda: self._has_started(begin), f"the worker did not start: {self.log.read_text()}"
        )

    def stop_worker(self) -> None:
        """Stop the worker as launchd and systemd do."""
        assert self._worker is not None
        self._worker.terminate()
        self._worker.wait(SLOW_MACHINE_SECONDS)

    def kill_worker(self) -> None:
        """Kill the worker alone: its run is another process, in another group."""
        if self._worker:
            kill(self._worker)

    def ask(self, method: str, path: str, **json: Any) -> Any:
        """Ask the API as the UI does; a database that is busy is asked again, as by any client."""
        url = f"{self.server.api}{path}"

        def answered() -> httpx.Response | None:
            answer = httpx.request(method, url, json=json or None, timeout=60)
            return None if answer.status_code == 503 else answer

        answer = wait_for(answered, f"{url} stays busy")
        answer.raise_for_status()
        return answer.json() if answer.content else None

    def run(self, deployment: str, **spec: Any) -> str:
        """Ask for a run of a deployment with a spec of our own; returns the run's id."""
        found = self.ask("GET", f"/deployments/name/{deployment}")
        path = f"/deployments/{found['id']}/create_flow_run"
        state = {"type": "SCHEDULED", "name": "Scheduled"}
        return self.ask("POST", path, parameters={"spec": spec}, state=state)["id"]

    def run_by_command(self, deployment: str, **spec: Any) -> str:
        """Ask for a run as a person does in a shell; returns the run's id."""
        parameters = json.dumps({"spec": spec})
        command = ("deployment", "run", deployment, "--params", parameters)
        screen = self.command_line.run(*command, program="prefect").stdout
        uuid = re.search(r"UUID: ([0-9a-f-]{36})", screen)
        assert uuid, screen
        return uuid[1]

    def set_spec(self, deployment: str, spec: dict[str, Any]) -> None:
        """Change a deployment's parameters, as a person does in the UI."""
        found = self.ask("GET", f"/deployments/name/{deployment}")
        self.ask("PATCH", f"/deployments/{found['id']}", parameters={"spec": spec})

    def runs_with_tag(self, tag: str) -> list[dict[str, Any]]:
        """Return all runs that have a tag."""
        return self.ask("POST", "/flow_runs/filter", flow_runs={"tags": {"all_": [tag]}})

    def start_elsewhere(self, deployment: str) -> str:
        """Return a run that says that it runs, though no process of this machine does it."""
        found = self.ask("GET", f"/deployments/name/{deployment}")
        path = f"/deployments/{found['id']}/create_flow_run"
        run = self.ask("POST", path, state={"type": "PENDING"})["id"]
        state = {"type": "RUNNING", "name": "Running"}
        self.ask("POST", f"/flow_runs/{run}/set_state", state=state, force=True)
        return run

    def beat(self, run: str, tag: str) -> None:
        """Send a heartbeat of a run, as its process does."""
        event = {
            "event": "prefect.flow-run.heartbeat",
            "id": str(uuid4()),
            "occurred": datetime.now(UTC).isoformat(),
            "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
            "related": [
                {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}
            ],
        }
        answer = httpx.post(f"{self.server.api}/events", json=[event], timeout=60)
        answer.raise_for_status()

    def get(self, run: str) -> dict[str, Any]:
        """Return a run as the API shows it."""
        return self.ask("GET", f"/flow_runs/{run}")

    def wait(self, run: str, *types: str) -> dict[str, Any]:
        """Wait until a run is in a state of one of these types (default: any final one)."""
        wanted = types or FINAL
        return wait_for(
            lambda: (seen := self.get(run))["state_type"] in wanted and seen,
            f"run {run} is not {wanted}",
        )

    def pid(self, run: str) -> int:
        """Return the process of a run: the living one, if an earlier one has died."""

        def living() -> int | None:
            found = self.get(run)["infrastructure_pid"]
            pid = int(str(found).rpartition(":")[2]) if found else 0
            return pid if pid and is_flow_process(pid) else None

        return wait_for(living, "the run has no process")

    def retry(self, run: str) -> None:
        """Press Retry, as the UI does it."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
        self.ask("POST", f"/flow_runs/{run}/set_state", state=state, force=True)

    def let_expire(self, run: str) -> None:
        """Let the week pass in which somebody could have answered a run's question."""
        state = self.get(run)["state"]
        assert state["state_details"]["pause_timeout"]
        state["state_details"]["pause_timeout"] = "2026-01-01T00:00:00Z"
        kept = {key: state[key] for key in ("type", "name", "message", "state_details")}
        self.ask("POST", f"/flow_runs/{run}/set_state", state=kept, force=True)

    def cancel(self, run: str) -> None:
        """Press Cancel, as the UI does it."""
        state = {"type": "CANCELLING", "name": "Cancelling"}
        self.ask("POST", f"/flow_runs/{run}/set_state", state=state)

    def artifacts(self, run: str) -> dict[str, dict[str, Any]]:
        """Return the artifacts of a run by key, the latest of each."""
        wanted = {"flow_run_id": {"any_": [run]}}
        found = self.ask("POST", "/artifacts/filter", artifacts=wanted, sort="CREATED_DESC")
        return {one["key"]: one for one in reversed(found)}

    def task_states(self, run: str) -> dict[str, str]:
        """Return the name of the last state of each of a run's tasks."""
        wanted = {"id": {"any_": [run]}}
        found = self.ask(
            "POST", "/task_runs/filter", flow_runs=wanted, sort="EXPECTED_START_TIME_ASC"
        )
        return {one["name"]: one["state_name"] for one in found}

    def dead_tasks(self, run: str) -> list[str]:
        """Return the names of the tasks that a process of a run took with it."""
        crashed = {"state": {"type": {"any_": ["CRASHED"]}}}
        wanted = {"id": {"any_": [run]}}
        found = self.ask("POST", "/task_runs/filter", flow_runs=wanted, task_runs=crashed)
        return [one["name"] for one in found]

    def states(self, run: str) -> list[str]:
        """Return the names of all states that a run was in."""
        found = self.ask("GET", f"/flow_run_states/?flow_run_id={run}")
        return [one["name"] for one in sorted(found, key=lambda one: one["timestamp"])]

    def logs(self, run: str) -> list[str]:
        """Return the log lines of a run, oldest first."""
        wanted = {"flow_run_id": {"any_": [run]}}
        found = self.ask("POST", "/logs/filter", logs=wanted, sort="TIMESTAMP_ASC")
        return [one["message"] for one in found]

    def save_secret(self, name: str, value: str) -> None:
        """Make a Secret block, as a person does in the UI."""
        code = "import sys; from prefect.blocks.system import Secret; "
        code += "Secret(value=sys.stdin.read()).save(sys.argv[1])"
        subprocess.run(
            [sys.executable, "-c", code, name],
            env=self.command_line.environment,
            input=value.encode(),
            check=True,
        )

    def _has_started(self, begin: int) -> bool:
        assert self._worker is not None
        assert self._worker.poll() is None, self.log.read_text()
        return b"started!" in self.log.read_bytes()[begin:]
