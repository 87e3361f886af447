"""^C, SIGTERM, SIGHUP and a closed terminal: a command ends within seconds and goes on later."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.e2e.command_line import CommandLine
from tests.e2e.conftest import HUB_TOKEN, UPSTREAM
from tests.hub_server import HubServer
from tests.pseudo_terminal import PseudoTerminal, is_alive

# A command ends within ten seconds on a machine that has a core for it.
LOADED_SECONDS = 50
SLOW = 200_000  # bytes per second and connection


class Run:
    """`glm-quant run` in a terminal, stopped and started again in one workspace."""

    def __init__(self, command_line: CommandLine, hub: HubServer, recipe: Path, root: Path) -> None:
        self.hub, self.workspace = hub, root / "work"
        environment = {"HF_ENDPOINT": hub.url, "HF_TOKEN": HUB_TOKEN, "HF_HUB_DISABLE_XET": "1"}
        self._environment = command_line.environment | environment
        self._command = [
            *("glm-quant", "run", recipe, "--source", f"hf://{UPSTREAM}"),
            *("--workspace", self.workspace),
        ]

    def shards(self) -> dict[str, int]:
        """Names and times of the output shards that are finished."""
        names = [path.stem for path in (self.workspace / "records" / "shards").glob("*.json")]
        folder = self.workspace / "checkpoint"
        return {name: (folder / name).stat().st_mtime_ns for name in names}

    def stopped(
        self,
        when: Callable[[PseudoTerminal], object],
        stop: Callable[[PseudoTerminal], None],
        code: int,
    ) -> str:
        """Start it, stop it, hold it to the end that was promised; returns what it printed."""
        terminal = PseudoTerminal(self._command, self._environment)
        try:
            terminal.wait_for(lambda: when(terminal))
            processes = terminal.processes()
            assert any("flows.temporary_server" in name for name in processes.values()), processes
            begin = time.monotonic()
            stop(terminal)
            assert terminal.wait() == code, terminal.text
            assert time.monotonic() - begin < LOADED_SECONDS
            assert [name for pid, name in processes.items() if is_alive(pid)] == []
            assert "Traceback" not in terminal.text
            return terminal.text
        finally:
            terminal.kill()


@pytest.fixture
def run(embedded: CommandLine, hub: HubServer, quick: Path, tmp_path: Path) -> Iterator[Run]:
    yield Run(embedded, hub, quick, tmp_path)
    hub.rate = None


def interrupt(terminal: PseudoTerminal) -> None:
    terminal.type(b"\x03")


@pytest.mark.slow
def test_a_run_that_is_stopped_in_any_stage_goes_on_from_there(run: Run) -> None:
    """Stopped while it fetches, quantizes, compares, evaluates: no process stays, no work is lost.

    It says where it stopped, and the command that goes on.
    """
    run.hub.rate = SLOW
    said = run.stopped(lambda _: list(run.workspace.glob("source/*.part")), interrupt, code=130)
    assert "Stopped by ^C in quantize, 0% done. What is finished is kept" in said
    assert f"--workspace {run.workspace}" in " ".join(said.split())
    assert list(run.workspace.glob("source/*.part"))
    run.hub.rate = 2_000_000
    said = run.stopped(lambda _: run.shards(), lambda it: it.send(signal.SIGTERM), code=143)
    assert re.search(r"Stopped by SIGTERM in quantize, \d+% done", said), said
    finished = run.shards()
    run.hub.rate = None
    run.stopped(lambda it: "parity" in it.text, PseudoTerminal.close, code=129)
    assert finished.items() <= run.shards().items()
    whole = run.shards()
    said = run.stopped(
        lambda it: (
            "evaluate" in it.text
            and any("glm_quant.child_process" in name for name in it.processes().values())
        ),
        interrupt,
        code=130,
    )
    assert re.search(r"Stopped by \^C in evaluate, \d+% done", said), said
    assert run.shards() == whole
