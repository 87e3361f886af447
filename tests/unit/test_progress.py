"""Progress in the UI: what it costs the server."""

import time
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest

from glm_quant.stages.base import Stage
from tasks import progress


def test_many_steps_are_two_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures that change a thousand times a second are sent at most once in five seconds.

    The server is not there: what is counted are the calls that would write to its database.
    """
    writes: list[tuple[float, str]] = []

    def create(percent: float, key: str, description: str) -> object:
        writes.append((percent, description))
        return uuid4()

    def update(_: object, percent: float, description: str) -> None:
        writes.append((percent, description))

    monkeypatch.setattr(progress, "create_progress_artifact", create)
    monkeypatch.setattr(progress, "update_progress_artifact", update)
    begin = time.monotonic()
    with progress.progress_shown(["parity"]):
        report = progress.progress_of(cast("Stage[Any]", SimpleNamespace(name="parity")))
        for done in range(1000):
            report(done, 1000)
    assert len(writes) <= 2 + (time.monotonic() - begin) / 5
    assert writes[-1] == (100.0, "done")
