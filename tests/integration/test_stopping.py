"""A command that cannot stop in order is ended: its main thread stands in native code."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.pseudo_terminal import PseudoTerminal, is_alive

# Hashing goes on for hours in one native call. No handler of Python's runs meanwhile.
STUCK = """
import hashlib, subprocess, sys
import flows.cli.stopping as stopping
from flows.cli.terminal import ERRORS
from glm_quant.children import note_child

stopping._ORDERLY_SECONDS = float(sys.argv[1])
with stopping.stopping_in_order(ERRORS):
    child = subprocess.Popen(["sleep", "1000"], stdin=subprocess.PIPE, start_new_session=True)
    note_child(child)
    stopping.stand_at(lambda: " in parity, 12% done")
    print(f"child {child.pid} runs", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""


@pytest.mark.parametrize(
    ("seconds", "numbers", "code", "how"),
    [
        ("0.1", [signal.SIGTERM], 143, "Stopped by SIGTERM"),
        ("0.1", [signal.SIGHUP], 129, "Stopped by SIGHUP"),
        ("1000", [signal.SIGINT, signal.SIGINT], 130, "Ended at once by ^C"),
        ("1000", [signal.SIGTERM, signal.SIGINT], 143, "Ended at once by SIGTERM"),
    ],
)
def test_a_command_in_native_code_is_ended(
    tmp_path: Path, seconds: str, numbers: list[int], code: int, how: str
) -> None:
    """After seconds, or at the second signal, which is ^C: with its children, saying where."""
    script = tmp_path / "glm-quant"
    script.write_text(STUCK)
    terminal = PseudoTerminal([sys.executable, script, seconds], os.environ)
    try:
        terminal.wait_for(lambda: "runs" in terminal.text)
        processes = terminal.processes()
        assert len(processes) == 2
        terminal.send(numbers[0])
        for number in numbers[1:]:
            terminal.wait_for(lambda: "Stopping" in terminal.text)
            terminal.send(number)
        assert terminal.wait() == code, terminal.text
    finally:
        terminal.kill()
    assert f"{how} in parity, 12% done. What is finished is kept" in terminal.text
    assert f"  glm-quant {seconds}" in terminal.text
    assert [pid for pid in processes if is_alive(pid)] == []
    assert "Traceback" not in terminal.text
