"""Trying again: what may pass with time, how long to wait, and when to give up.

A remote place raises `TransientError` for what may be different next time and `SourceError` (a
target: `PublishError`) for what will not. Only failures in a row count: whoever makes progress may
go on for ever.
"""

import logging
import math
import random
import re
import socket
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

from glm_quant.errors import GlmQuantError, SourceError
from glm_quant.hub.waiting import Wait, waiting

_log = logging.getLogger(__name__)

T = TypeVar("T")


class TransientError(Exception):
    """Something that may pass; never leaves this package.

    Attributes:
        wait_seconds: how long the other side asked us to wait, if it did.
        unresolved: a host's name was not found, so there may be no such host.
    """

    def __init__(
        self, message: str, wait_seconds: float | None = None, *, unresolved: bool = False
    ) -> None:
        super().__init__(message)
        self.wait_seconds = wait_seconds
        self.unresolved = unresolved


class StoppedError(Exception):
    """Whoever wanted the file wants it no more; never leaves this package."""


@dataclass(frozen=True)
class Patience:
    """How often and how slowly to try again.

    The defaults bear about seven minutes of a network that is away, longer than a router takes to
    start. `longest_asked_seconds` bounds what a server may ask for with Retry-After. A name that is
    not found is given up sooner: it is wrong, or there is no network, and whoever has only begun
    wants to know. A run that has worked for hours uses `enduring`.
    """

    tries: int = 13
    first_seconds: float = 0.5
    longest_seconds: float = 60.0
    longest_asked_seconds: float = 900.0
    unresolved_seconds: float = 20.0

    def pause(self, failures: int, asked: float | None) -> float:
        """Return the seconds to wait after so many failures in a row."""
        if asked is not None:
            return min(asked, self.longest_asked_seconds)
        grown = self.first_seconds * 2.0 ** min(failures - 1, 30)
        # Jitter, so that many clients of one server do not come back in step.
        return min(grown, self.longest_seconds) * random.uniform(0.75, 1.0)  # noqa: S311

    def remaining_seconds(self, failures: int) -> float:
        """Return how long the pauses take at most that are still to come."""
        return sum(
            min(self.first_seconds * 2.0 ** min(i - 1, 30), self.longest_seconds)
            for i in range(failures + 1, self.tries)
        )

    def enduring(self) -> "Patience":
        """Return the same patience for a place that has answered: its name is right."""
        return replace(self, unresolved_seconds=math.inf)


class Attempts:
    """Counts failures in a row, waits between them, and tells when that takes long."""

    def __init__(
        self,
        patience: Patience,
        what: str,
        stop: threading.Event | None = None,
        gives_up: type[GlmQuantError] = SourceError,
        *,
        is_transfer: bool = False,
    ) -> None:
        """Begin counting.

        Args:
            patience: when to give up.
            what: the file and its place, for messages.
            stop: set by another thread to end the waiting.
            gives_up: what the last failure raises.
            is_transfer: a try takes long by itself, and only what follows a failure is a wait.
        """
        self._gives_up = gives_up
        self._is_transfer = is_transfer
        self._patience = patience
        self._what = what
        self._stop = stop or threading.Event()
        self._first_failure = 0.0
        self._last_failure: TransientError | None = None
        self._wait: Wait | None = None
        self.failures = 0

    @contextmanager
    def told(self) -> Generator[None]:
        """Tell what the block waits for when nothing comes for some seconds."""
        with waiting(self._what, self.state) as self._wait:
            yield

    def state(self) -> str | None:
        """Return how often it was tried and when it is given up; None while nothing is amiss."""
        if self._is_transfer and not self.failures:
            return None
        tries = self._patience.tries
        pauses = self._patience.remaining_seconds(self.failures)
        limit = f"it is given up after {tries} failures in a row, in about {_span(pauses)}"
        if self._last_failure is None or not self.failures:
            return f"the first try has no answer yet; {limit}"
        if self._last_failure.unresolved and self._patience.unresolved_seconds < pauses:
            limit = f"it is given up after {_span(self._patience.unresolved_seconds)} of this"
        plural = "y" if self.failures == 1 else "ies"
        return f"{self.failures} tr{plural} failed, the last one: {self._last_failure}; {limit}"

    def succeed(self) -> None:
        """Forget the failures: there was progress."""
        self.failures = 0
        self.note_progress()

    def note_progress(self) -> None:
        """Note that something came, so that silence is counted from here."""
        if self._wait is not None:
            self._wait.restart()

    def fail(self, error: TransientError, state: str = "") -> None:
        """Count a failure and wait.

        Args:
            error: what happened.
            state: how far it got, for the message.

        Raises:
            GlmQuantError: that was the last try; of the kind `gives_up`.
            StoppedError: nobody wants it any more.
        """
        now = time.monotonic()
        self._first_failure = self._first_failure if self.failures else now
        self.failures += 1
        self._last_failure = error
        pause = self._patience.pause(self.failures, error.wait_seconds)
        waited = now - self._first_failure + pause
        if error.unresolved and waited > self._patience.unresolved_seconds:
            raise self._final(
                f"{self._what}: {error}; tried {self.failures} times. Check the network, the "
                "name, and HF_ENDPOINT or AWS_ENDPOINT_URL if one is set."
            ) from None
        if self.failures >= self._patience.tries:
            raise self._final(
                f"{self._what}: {self.failures} tries in a row failed{state}, the last one: "
                f"{error}. Check the network and the server, then run the same command again: it "
                "goes on from what is on disk."
            ) from None
        _log.info("%s: %s; try %d in %.1f s", self._what, error, self.failures + 1, pause)
        if self._stop.wait(pause):
            raise StoppedError

    def _final(self, message: str) -> GlmQuantError:
        final = self._gives_up(message)
        final.may_pass = True
        return final


def _span(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def connection_failure(where: str, error: Exception) -> TransientError:
    """Return what a failed connection means: it may pass, and a name that is not found rarely does.

    Args:
        where: the host or the service, without any secret.
        error: as the client's library raised it. Its own words may hold a signed address.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, socket.gaierror):
        cause = cause.__cause__ or cause.__context__
    if cause is None:
        words = str(error)
        detail = f" ({words})" if words and "://" not in words else ""
        return TransientError(f"{where}: {type(error).__name__}{detail}")
    return TransientError(f"{where}: its name does not resolve ({cause.strerror})", unresolved=True)


def retry(
    action: Callable[[], T],
    patience: Patience,
    what: str,
    gives_up: type[GlmQuantError] = SourceError,
    *,
    is_transfer: bool = False,
) -> T:
    """Return what `action` returns, trying again while it raises `TransientError`.

    Args:
        action: what to do.
        patience: when to give up.
        what: the file or the question and its place, for messages.
        gives_up: what the last failure raises.
        is_transfer: it takes long by itself, so only what follows a failure is told as a wait.

    Raises:
        GlmQuantError: it never succeeded; of the kind `gives_up`.
    """
    attempts = Attempts(patience, what, gives_up=gives_up, is_transfer=is_transfer)
    with attempts.told():
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
    retry_after = headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", retry_after):
        return float(retry_after)
    if retry_after:
        try:
            until = parsedate_to_datetime(retry_after)
            return max(0.0, (until - datetime.now(UTC)).total_seconds())
        except (ValueError, TypeError):
            return None
    spent = re.search(r"\br=0\s*;\s*t=(\d{1,9})", headers.get("ratelimit", ""))
    return float(spent[1]) if spent else None
