"""Processes that this one starts and that must not outlive it.

A child leads a session of its own, so that ^C in a terminal reaches only the process that started
it, which then ends the child in order. Its standard input is a pipe that nobody writes to: when the
parent is gone, however it went, the pipe closes and the child ends itself.
"""

import contextlib
import os
import signal
import subprocess
import threading
from collections.abc import Callable
from typing import Any

_living: set["subprocess.Popen[Any]"] = set()


def note_child(child: "subprocess.Popen[Any]") -> None:
    """Note a child for `kill_children`: its stdin is a pipe, and it leads a session of its own."""
    _living.add(child)


def end_child(child: "subprocess.Popen[Any]", seconds: float = 0.0) -> None:
    """Close a child's standard input, wait for its end, then kill what is left of its session.

    Args:
        child: one that was noted.
        seconds: how long it may take to end by itself.
    """
    if child.stdin:
        with contextlib.suppress(OSError):
            child.stdin.close()
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        _kill_session(child)
        child.wait()
    _living.discard(child)
    if child.stdout:
        child.stdout.close()


def kill_children() -> None:
    """Kill every child that still runs, and all that it started in its session."""
    for child in tuple(_living):
        if child.poll() is None:
            _kill_session(child)


def end_with_parent(end: Callable[[], None] | None = None) -> None:
    """In the child: end when the parent is gone.

    Args:
        end: begins to end this process in order; default: it is killed, with all of its session.
    """
    threading.Thread(target=_wait_for_parent, args=(end or _kill_own_session,), daemon=True).start()


def _wait_for_parent(end: Callable[[], None]) -> None:
    # A raw read: a buffered one would hold a lock that the interpreter needs to end.
    while os.read(0, 4096):
        pass
    end()


def _kill_own_session() -> None:
    if os.getsid(0) == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def _kill_session(child: "subprocess.Popen[Any]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
