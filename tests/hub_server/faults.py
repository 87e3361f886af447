"""What the server does wrong, when, and what it was asked."""

import re
import threading
from dataclasses import dataclass, field, replace
from typing import Literal

Kind = Literal[
    "status",  # answer `status` with `headers`
    "delay",  # answer after `seconds`, or as soon as `until` is set
    "reset_before",  # reset the connection instead of answering
    "drop",  # close after `after` bytes of the body
    "reset",  # reset after `after` bytes of the body
    "stall",  # send nothing more after `after` bytes, for `seconds`
    "short",  # announce and send `after` bytes too few
    "long",  # announce and send `after` bytes too many
    "corrupt",  # flip one bit of the byte at position `after` of the file
    "ignore_range",  # send the whole file although a range was asked for
    "shift",  # send, and announce, a range that begins `after` bytes further on
    "expired_link",  # send on to an address whose signature has expired
    "cut_upload",  # reset after `after` bytes of what is sent to us
    "lose_reply",  # do what is asked, then reset instead of answering
]


@dataclass
class Fault:
    """One thing to do wrong, `times` times, for requests whose path matches."""

    kind: Kind
    path: str = r"^/cdn/"
    times: int = 1
    skip: int = 0
    after: int = 0
    status: int = 503
    seconds: float = 30.0
    headers: dict[str, str] = field(default_factory=dict)
    until: threading.Event = field(default_factory=threading.Event)


@dataclass
class Request:
    """One request as the server saw it; `status` is what it answered."""

    method: str
    path: str
    host: str
    range: str | None
    authorization: str | None
    file: str = ""
    status: int | str = ""
    received: int = 0


class Faults:
    """The faults that are still to happen."""

    def __init__(self) -> None:
        self._waiting: list[Fault] = []
        self._lock = threading.Lock()

    def add(self, fault: Fault) -> None:
        """Do this wrong from now on."""
        with self._lock:
            self._waiting.append(replace(fault))  # it counts down

    def clear(self) -> None:
        """Do everything right from now on."""
        with self._lock:
            self._waiting.clear()

    def take(self, path: str) -> Fault | None:
        """Return what to do wrong for a request, and count it."""
        with self._lock:
            for fault in self._waiting:
                if fault.times > 0 and re.search(fault.path, path):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None
