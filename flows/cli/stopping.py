"""What SIGINT and SIGTERM do to a run: it stops as by an exception, and says how to go on."""

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType

import typer
from rich.console import Console


class Terminated(KeyboardInterrupt):
    """SIGTERM came. Like SIGINT no `Exception`, so that nothing takes it for a failure."""


@contextmanager
def stopping_in_order(console: Console) -> Generator[None]:
    """Let the block end in order when it is stopped: what was written is made durable.

    Exits with 130 or 143, as a shell expects. A second signal ends the process at once.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals are the main thread's
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        signal.signal(number, _stop)
    try:
        yield
    except KeyboardInterrupt as stopped:
        console.print("Stopped. What is finished is kept; the same command goes on from there.")
        code = signal.SIGTERM if isinstance(stopped, Terminated) else signal.SIGINT
        raise typer.Exit(128 + code) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _stop(number: int, _: FrameType | None) -> None:
    for either in (signal.SIGINT, signal.SIGTERM):
        signal.signal(either, signal.SIG_DFL)
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt
