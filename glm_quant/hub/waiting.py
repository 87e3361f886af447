"""What a command waits for, told while it waits.

A thread looks once a second at everything that is waited for. What has brought nothing for five
seconds is told in the log, as a warning: what it is, how often it was tried, when it is given up;
and again later, less and less often. Progress of any kind begins the count anew.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field

_log = logging.getLogger(__name__)

_FIRST_SECONDS = 5.0
_LONGEST_SECONDS = 60.0
_LOOK_SECONDS = 0.5


@dataclass(eq=False)
class Wait:
    """Something that is waited for.

    Attributes:
        subject: the file or the question, and its place.
        state: returns how often it was tried, and when it is given up; None while all is well.
        since: when it last brought something.
        next_line: after how many seconds of silence it is told next.
    """

    subject: str
    state: Callable[[], str | None]
    since: float = field(default_factory=time.monotonic)
    next_line: float = _FIRST_SECONDS
    context: contextvars.Context = field(default_factory=contextvars.copy_context)

    def restart(self) -> None:
        """Begin the count anew: something came."""
        self.since = time.monotonic()
        self.next_line = _FIRST_SECONDS

    def line(self, now: float) -> str | None:
        """Return what is to be told at a time, if it is time."""
        seconds = now - self.since
        if seconds < self.next_line or (state := self.state()) is None:
            return None
        self.next_line = seconds + min(self.next_line, _LONGEST_SECONDS)
        return f"{self.subject}: nothing came for {seconds:.0f} s; {state}"


_waits: list[Wait] = []
_lock = threading.Lock()
_watching = False


@contextmanager
def waiting(subject: str, state: Callable[[], str | None]) -> Generator[Wait]:
    """Tell what the block waits for, if it takes long.

    Args:
        subject: the file or the question, and its place.
        state: returns how often it was tried, and when it is given up; None while all is well.
    """
    global _watching
    wait = Wait(subject, state)
    with _lock:
        _waits.append(wait)
        if not _watching:
            _watching = True
            threading.Thread(target=_watch, name="waits", daemon=True).start()
    try:
        yield wait
    finally:
        with _lock:
            _waits.remove(wait)


def _watch() -> None:
    """Tell the long ones; ends when nothing is waited for any more."""
    global _watching
    while True:
        time.sleep(_LOOK_SECONDS)
        with _lock:
            if not _waits:
                _watching = False
                return
            now = time.monotonic()
            lines = [(wait.context, line) for wait in _waits if (line := wait.line(now))]
        for context, line in lines:
            # In the context of whoever waits, so that the line finds the run that it belongs to.
            context.run(_log.warning, "%s", line)
