"""A command in a terminal of its own: what it prints, ^C, and a terminal that is closed."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

# Far beyond what a loaded machine needs.
LIMIT_SECONDS = 300


def _own_terminal() -> None:
    """In the child: take stdin for the controlling terminal, and ^C as a shell leaves it."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


class PseudoTerminal:
    """A running command and its terminal."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self._keyboard, screen = pty.openpty()
        self._process = subprocess.Popen(
            [str(word) for word in command],
            stdin=screen,
            stdout=screen,
            stderr=screen,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=_own_terminal,
        )
        os.close(screen)
        self._printed = bytearray()
        self._closed = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def text(self) -> str:
        """Everything that was printed, bars and all."""
        return self._printed.decode(errors="replace")

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until something is true while the command runs."""
        deadline = time.monotonic() + LIMIT_SECONDS
        while not condition():
            assert self._process.poll() is None, f"it has ended:\n{self.text}"
            assert time.monotonic() < deadline, f"it takes too long:\n{self.text}"
            time.sleep(0.02)

    def type(self, keys: bytes) -> None:
        os.write(self._keyboard, keys)

    def send(self, number: int) -> None:
        """Send a signal to the command alone."""
        self._process.send_signal(number)

    def close(self) -> None:
        """Close the terminal's window."""
        self._closed.set()
        self._reader.join()  # who reads from it keeps it open
        os.close(self._keyboard)

    def processes(self) -> dict[int, str]:
        """The command and all that it started, as process numbers and commands."""
        lines = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid=,command="], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        rows = [line.split(maxsplit=2) for line in lines]
        family = {str(self._process.pid)}
        while more := {pid for pid, parent, _ in rows if parent in family} - family:
            family |= more
        return {int(pid): command for pid, _, command in rows if pid in family}

    def wait(self) -> int:
        """Wait for the command's end; returns its exit code."""
        code = self._process.wait(LIMIT_SECONDS)
        if not self._closed.is_set():
            time.sleep(0.2)  # what it printed last is on its way
            self.close()
        return code

    def kill(self) -> None:
        """Kill the command if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def _read(self) -> None:
        with contextlib.suppress(OSError):
            while not self._closed.is_set():
                if select.select([self._keyboard], [], [], 0.05)[0]:
                    self._printed += os.read(self._keyboard, 1 << 16)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not asked for does not."""
    answer = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    ).stdout.strip()
    return bool(answer) and not answer.startswith("Z")
