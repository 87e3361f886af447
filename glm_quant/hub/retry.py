"""Trying again: what may pass with time, how long to wait, and when to give up.

A remote place raises `TransientError` for what may be different next time and `SourceError` (a
target: `PublishError`) for what will not. Only failures in a row count: whoever makes progress may
go on for ever.
"""

import logging
import random
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from glm_quant.errors import GlmQuantError, SourceError

_log = logging.getLogger(__name__)

T = TypeVar("T")


class TransientError(Exception):
    """Something that may pass; never leaves this package.

    Attributes:
        wait_seconds: how long the other side asked us to wait, if it did.
    """

    def __init__(self, message: str, wait_seconds: float | None = None) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds


class StoppedError(Exception):
    """Whoever wanted the file wants it no more; never leaves this package."""


@dataclass(frozen=True)
class Patience:
    """How often and how slowly to try again.

    The defaults bear about seven minutes of a network that is away, longer than a router takes to
    start. `longest_asked_seconds` bounds what a server may ask for with Retry-After.
    """

    tries: int = 13
    first_seconds: float = 0.5
    longest_seconds: float = 60.0
    longest_asked_seconds: float = 900.0

    def pause(self, failures: int, asked: float | None) -> float:
        """Return the seconds to wait after so many failures in a row."""
        if asked is not None:
            return min(asked, self.longest_asked_seconds)
        grown = self.first_seconds * 2.0 ** min(failures - 1, 30)
        # Jitter, so that many clients of one server do not come back in step.
        return min(grown, self.longest_seconds) * random.uniform(0.75, 1.0)  # noqa: S311


class Attempts:
    """Counts failures in a row and waits between them."""

    def __init__(
        self,
        patience: Patience,
        what: str,
        stop: threading.Event | None = None,
        gives_up: type[GlmQuantError] = SourceError,
    ) -> None:
        """Begin counting.

        Args:
            patience: when to give up.
            what: the file and its place, for messages.
            stop: set by another thread to end the waiting.
            gives_up: what the last failure raises.
        """
        self._gives_up = gives_up
        self._patience = patience
        self._what = what
        self._stop = stop or threading.Event()
        self.failures = 0

    def succeed(self) -> None:
        """Forget the failures: there was progress."""
        self.failures = 0

    def fail(self, error: TransientError, state: str = "") -> None:
        """Count a failure and wait.

        Args:
            error: what happened.
            state: how far it got, for the message.

        Raises:
            GlmQuantError: that was the last try; of the kind `gives_up`.
            StoppedError: nobody wants it any more.
        """
        self.failures += 1
        if self.failures >= self._patience.tries:
            last = self._gives_up(
                f"{self._what}: {self.failures} tries in a row failed{state}, the last one: "
                f"{error}. Check the network and the server, then run the same command again: it "
                "goes on from what is on disk."
            )
            last.may_pass = True
            raise last from None
        pause = self._patience.pause(self.failures, error.wait_seconds)
        _log.info("%s: %s; try %d in %.1f s", self._what, error, self.failures + 1, pause)
        if self._stop.wait(pause):
            raise StoppedError


def retry(
    action: Callable[[], T],
    patience: Patience,
    what: str,
    gives_up: type[GlmQuantError] = SourceError,
) -> T:
    """Return what `action` returns, trying again while it raises `TransientError`.

    Raises:
        GlmQuantError: it never succeeded; of the kind `gives_up`.
    """
    attempts = Attempts(patience, what, gives_up=gives_up)
    while True:
        try:
            return action()
        except TransientError as error:
            attempts.fail(error)


def asked_wait(headers: Mapping[str, str]) -> float | None:
    """Return the seconds that an answer asks to wait: `Retry-After`, or the Hub's `RateLimit`.

    `Retry-After` is a number or a date (RFC 9110, 10.2.3). The Hub's `RateLimit: "api";r=0;t=55`
    says with `t` when the window ends (IETF draft ratelimit-headers).
    """
    said = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", said):
        return float(said)
    if said:
        try:
            return max(0.0, (parsedate_to_datetime(said) - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):
            return None
    spent = re.search(r"\br=0\s*;\s*t=(\d{1,9})", headers.get("ratelimit", ""))
    return float(spent[1]) if spent else None
