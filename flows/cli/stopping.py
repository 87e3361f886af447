"""What ^C, SIGTERM, SIGHUP and a closed terminal do to a command: it ends within seconds.

The signal raises an exception in the main thread, as ^C does in any Python program: what was
written is made durable, children are ended, and Prefect learns of it. But the main thread may stand
in native code for minutes, where no handler runs, or wait for threads that do. So a thread of its
own reads each signal's number from a pipe, and ends the process when that takes too long, or at a
second ^C. This is safe at any moment: a run that is killed goes on from what is on disk.
"""

import contextlib
import logging
import os
import select
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import typer
from rich.console import Console

from glm_quant.children import kill_children

_NAMES = {signal.SIGINT: "^C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
# How long a command may take to end in order.
_ORDERLY_SECONDS = 7.0
_STOPPING = "Stopping; ^C (again) ends at once."
_SHOW_CURSOR = "\x1b[?25h"


class Stopped(KeyboardInterrupt):
    """A signal came. No `Exception`, so that nothing takes it for a failure."""


class _Stop:
    """The first signal that asked a command to end, and where the command was."""

    def __init__(self) -> None:
        self.number: int | None = None
        self.raised = False
        self.place: Callable[[], str] = lambda: ""
        self.terminals = [descriptor for descriptor in (1, 2) if os.isatty(descriptor)]

    def note(self, number: int) -> None:
        if self.number is None:
            self.number = number
            # A thread that fetches may log a last line when Prefect takes no more of them.
            logging.raiseExceptions = False
        self._leave_closed_terminal()

    def handle(self, number: int, _: FrameType | None) -> None:
        """Raise in the main thread, once: a second exception would cut the orderly end short."""
        self.note(number)
        if not self.raised:
            self.raised = True
            raise Stopped

    @property
    def code(self) -> int:
        """The exit code that a shell expects."""
        return 128 + (self.number or signal.SIGINT)

    def message(self, how: str) -> str:
        name = _NAMES.get(signal.Signals(self.code - 128), "")
        command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
        return (
            f"{how} by {name}{self.place()}. What is finished is kept; the same command goes on "
            f"from there:\n  {command}"
        )

    def end(self, how: str) -> None:
        """End the process from whatever it does, and its children."""
        kill_children()
        text = self.message(how)
        if 2 in self.terminals:
            text = f"{_SHOW_CURSOR}\r\n{text}"
        with contextlib.suppress(OSError):
            os.write(2, f"{text}\n".encode())
        os._exit(self.code)

    def _leave_closed_terminal(self) -> None:
        """Let whatever is still printed go nowhere: a write to a closed terminal is an error."""
        for descriptor in self.terminals:
            if not os.isatty(descriptor):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, descriptor)
                os.close(nowhere)


_stop = _Stop()


def stand_at(place: Callable[[], str]) -> None:
    """Say where the command is, for whoever stops it: a function that returns ` in quantize`."""
    _stop.place = place


@contextmanager
def stopping_in_order(console: Console) -> Generator[None]:
    """Let the block end in order when it is stopped; then the process exits with 129, 130 or 143.

    A signal that the process was started to ignore (`nohup`) stays ignored.
    """
    global _stop
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    _stop = stop = _Stop()
    numbers = [n for n in _NAMES if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop.handle) for number in numbers}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    pipe_before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    arguments = (reader, stop, numbers, console)
    threading.Thread(target=_watch, args=arguments, daemon=True).start()
    try:
        yield
    except BaseException:
        if stop.number is None:
            raise
        _print(console, stop.message("Stopped"))
        # Handlers and watch stay: the process ends now, and threads may keep it from that.
        raise typer.Exit(stop.code) from None
    finally:
        if stop.number is None:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(pipe_before)
            os.close(writer)


def _watch(reader: int, stop: _Stop, numbers: list[signal.Signals], console: Console) -> None:
    """Note signals as they come; end the process when it does not end by itself."""
    deadline: float | None = None
    while True:
        seconds = None if deadline is None else max(0.0, deadline - time.monotonic())
        if not select.select([reader], [], [], seconds)[0]:
            stop.end("Stopped")
        received = os.read(reader, 64)
        if not received:  # the block has ended
            os.close(reader)
            return
        for number in received:
            if number not in numbers:
                continue
            if deadline is not None and number == signal.SIGINT:
                stop.end("Ended at once")
            stop.note(number)
            if deadline is None:
                deadline = time.monotonic() + _ORDERLY_SECONDS
                # In a thread: whoever was interrupted may hold the console for a while.
                threading.Thread(target=_print, args=(console, _STOPPING), daemon=True).start()


def _print(console: Console, text: str) -> None:
    with contextlib.suppress(OSError):
        console.print(text, markup=False, highlight=False)
