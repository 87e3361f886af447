"""Where a stage's progress goes: to whoever watches this process, and to the run's page in the UI.

The UI gets one progress artifact a run. A thread of its own sends it, the latest figures only and
every few seconds: a server that is slow or away must never hold up a conversion.
"""

import contextvars
import logging
import threading
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from glm_quant.quantize.convert import Progress, Watcher
from glm_quant.report import format as say
from glm_quant.stages.base import Stage
from glm_quant.stages.quantize import QuantizeStage

_log = logging.getLogger("glm_quant.progress")
# Each update is a write to the server's database, which all runs, the worker and the UI share.
_SECONDS_BETWEEN_UPDATES = 5.0
# How long the last update may take at the end of a run.
_LAST_SECONDS = 10.0
ARTIFACT_KEY = "progress"


class _Silent:
    def begin(self, stage: str) -> None:
        pass

    def move(self, stage: str, done: int, total: int) -> None:
        pass


watcher: Watcher = _Silent()


def watch(replacement: Watcher) -> None:
    """Send progress of every stage in this process to a watcher."""
    global watcher
    watcher = replacement


class Board:
    """The latest figures of a run, and the thread that shows them."""

    def __init__(self, stages: Sequence[str]) -> None:
        """Begin with the first of the stages, which are counted on."""
        self._stages = stages
        self._latest = 0.0, stages[0]
        self._begun: tuple[float, float] | None = None
        self._changed = threading.Event()
        self._closing = threading.Event()
        self._artifact: UUID | None = None
        # The context tells Prefect which run the artifact is of.
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._send,), daemon=True)
        self._thread.start()

    def move(self, stage: Stage[Any], share: float) -> None:
        """Note how much of a stage, or of one of its parts, is done."""
        if stage.name not in self._stages:  # an upload beside the quantizer: no step of its own
            return
        number = self._stages.index(stage.name) + 1
        text = f"{stage.name} ({number} of {len(self._stages)} stages)"
        if isinstance(stage, QuantizeStage):
            share, figures = self._bytes(stage, share)
            text = f"{text}: {figures}"
        self._latest = 100 * share, text
        self._changed.set()

    def finish(self) -> None:
        """Show that the run is done."""
        self._latest = 100.0, "done"

    def stop(self, error: BaseException) -> None:
        """Show where the run stopped, beside the last figures."""
        percent, last = self._latest
        self._latest = percent, f"stopped in {last}: {type(error).__name__}"

    def close(self) -> None:
        """Send the last figures, within `_LAST_SECONDS`."""
        self._closing.set()
        self._changed.set()
        self._thread.join(_LAST_SECONDS)

    def _bytes(self, stage: QuantizeStage, share: float) -> tuple[float, str]:
        """Return the share of all output bytes, and the same in words with the time left."""
        sizes = [shard.size_bytes for shard in stage.build.plan.shards]
        done, total = sum(sizes[: stage.shard]) + share * sizes[stage.shard], sum(sizes)
        now = time.monotonic()
        self._begun = self._begun or (now, done)
        text = f"shard {stage.shard + 1} of {len(sizes)}, {say.size(done)} of {say.size(total)}"
        seconds, gained = now - self._begun[0], done - self._begun[1]
        if seconds > _SECONDS_BETWEEN_UPDATES and gained > 0:
            rate = gained / seconds
            text += f", {say.size(rate)}/s, {say.duration((total - done) / rate)} left"
        return done / total, text

    def _send(self) -> None:
        while not self._closing.is_set():
            self._changed.wait()
            self._changed.clear()
            self._best_effort(*self._latest)
            self._closing.wait(_SECONDS_BETWEEN_UPDATES)
        self._best_effort(*self._latest)

    def _best_effort(self, percent: float, text: str) -> None:
        try:
            if self._artifact is None:
                artifact = create_progress_artifact(percent, key=ARTIFACT_KEY, description=text)
                self._artifact = artifact if isinstance(artifact, UUID) else None
            else:
                update_progress_artifact(self._artifact, percent, description=text)
        except Exception as error:
            _log.debug("the progress could not be shown in the UI: %s", error)


_board: Board | None = None


@contextmanager
def progress_shown(stages: Sequence[str]) -> Generator[None]:
    """Show the progress of the stages in the block on the page of the flow run."""
    global _board
    _board = Board(stages)
    try:
        yield
        _board.finish()
    except BaseException as error:
        _board.stop(error)
        raise
    finally:
        _board.close()
        _board = None


def progress_of(stage: Stage[Any]) -> Progress:
    """Return a callback for a stage that shows (done, total) to the watcher and in the UI."""
    watcher.begin(stage.name)
    if _board is not None:
        _board.move(stage, 0.0)

    def report(done: int, total: int) -> None:
        watcher.move(stage.name, done, total)
        if _board is not None:
            _board.move(stage, done / total if total else 1.0)

    return report
