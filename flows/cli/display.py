"""The stages of a command as they run: bars in a terminal, lines a minute apart in a log file."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as Remaining

from flows.cli.stopping import stand_at
from glm_quant.report import format as say

_SECONDS_BETWEEN_LINES = 60.0
# Seconds over which a bar's speed is estimated, and lines over which a log file's is.
_SPEED_PERIOD = 24 * 3600.0
_SPEED_LINES = 30
# What goes on beside the stages of the run, in threads: neither ends the other.
_BESIDE = ("upload",)


class StageDisplay:
    """Shows stages as they run; a context manager. Implements `tasks.progress.Watcher`."""

    def __init__(
        self,
        console: Console,
        shard_bytes: Sequence[int] = (),
        seconds_between_lines: float = _SECONDS_BETWEEN_LINES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Prepare.

        Args:
            console: where to show them; a terminal gets bars, all else lines.
            shard_bytes: of the output shards that will be quantized, in order.
            seconds_between_lines: how far lines within a stage are apart.
            clock: seconds that only grow.
        """
        self._console, self._shard_bytes, self._clock = console, shard_bytes, clock
        self._stage: str | None = None
        self._shares: dict[str, float] = {}
        self._parts: dict[str, int] = {}
        self._begun: dict[str, float] = {}
        self._bars = _Bars(console, clock) if console.is_terminal else None
        # Times and shares of the stage's last lines.
        self._lines: deque[tuple[float, float]] = deque(maxlen=_SPEED_LINES)
        self._seconds_between_lines = seconds_between_lines
        self._closed = threading.Event()

    def begin(self, stage: str) -> None:
        """Show a stage, or count one more part of it."""
        self._parts[stage] = self._parts.get(stage, 0) + 1
        is_new = stage not in self._shares
        self._shares.setdefault(stage, 0.0)
        if self._bars:
            self._bars.show(stage)
        if stage in _BESIDE:
            if is_new:
                self._print(f"{stage}: begins, beside the other stages")
        elif stage != self._stage:
            self._end_stage("done")
            self._stage = stage
            self._begun[stage] = self._clock()
            self._lines.clear()
            self._print(f"{stage}: begins")

    def move(self, stage: str, done: int, total: int) -> None:
        """Note how much of the current part of a stage is done."""
        share = done / total if total else 1.0
        before = self._parts[stage] - 1
        if stage == "quantize" and self._shard_bytes:
            sizes = self._shard_bytes
            part = share * sizes[before] if before < len(sizes) else 0
            share = (sum(sizes[:before]) + part) / (sum(sizes) or 1)
        self._shares[stage] = min(share, 1.0)
        if self._bars:
            self._bars.move(stage, self._shares[stage])

    def place(self) -> str:
        """Return where the command is, for the line that says where it stopped."""
        if self._stage is None:
            return " before the first stage"
        return f" in {self._stage}, {self._shares[self._stage]:.0%} done"

    def tell(self) -> None:
        """Print one line: stage, share, rate, time left."""
        stage = self._stage
        if stage is None:
            return
        now, share = self._clock(), self._shares[stage]
        # The first line counts from the begin, later ones from there: what was finished before
        # counts within a moment, and is no speed.
        then, before = self._lines[0] if self._lines else (self._begun[stage], 0.0)
        self._lines.append((now, share))
        words = [f"{stage}: {share:.0%}"]
        total = sum(self._shard_bytes) if stage == "quantize" else 0
        if total:
            words.append(f"{say.size(share * total)} of {say.size(total)}")
        rate = (share - before) / (now - then) if now > then else 0.0
        if rate > 0:
            words.append(f"{say.size(rate * total)}/s" if total else f"{rate * 60:.1%} a minute")
            words.append(f"{say.duration((1 - share) / rate)} left")
        else:
            words.append(f"{say.duration(now - self._begun[stage])} so far")
        self._print(", ".join(words))

    def __enter__(self) -> Self:
        """Start to show."""
        stand_at(self.place)
        if self._bars:
            self._bars.start()
        else:
            threading.Thread(target=self._tell_again_and_again, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Show how the last stage ended, and stop."""
        self._closed.set()
        if error is None:
            self._end_stage("done")
        elif self._stage is not None:
            self._end_stage(f"stopped at {self._shares[self._stage]:.0%}")
        if self._bars:
            self._bars.stop()

    def _end_stage(self, how: str) -> None:
        if self._stage is None:
            return
        if how == "done":
            self._shares[self._stage] = 1.0
            if self._bars:
                self._bars.move(self._stage, 1.0)
        seconds = self._clock() - self._begun[self._stage]
        self._print(f"{self._stage}: {how}, after {say.duration(seconds)}")

    def _tell_again_and_again(self) -> None:
        while not self._closed.wait(self._seconds_between_lines):
            self.tell()

    def _print(self, line: str) -> None:
        """Print a line where there are no bars; that it cannot be printed ends no run."""
        if not self._bars:
            # Not by the console, which ends the process when its pipe is closed.
            with contextlib.suppress(OSError):
                self._console.file.write(f"{time.strftime('%H:%M:%S')} {line}\n")
                self._console.file.flush()


class _Bars:
    """A bar a stage; a terminal that was closed ends no run."""

    def __init__(self, console: Console, clock: Callable[[], float]) -> None:
        self._tasks: dict[str, TaskID] = {}
        self._progress = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=32),
            TextColumn("{task.percentage:>3.0f} %"),
            TimeElapsedColumn(),
            TextColumn("left"),
            Remaining(),
            console=console,
            # A layer of a large model takes minutes: the speed is that of all moves, not of the
            # last half minute, in which there may be none and so no time left to show.
            speed_estimate_period=_SPEED_PERIOD,
            get_time=clock,
        )

    def start(self) -> None:
        with contextlib.suppress(OSError):
            self._progress.start()

    def stop(self) -> None:
        with contextlib.suppress(OSError):
            self._progress.stop()

    def show(self, stage: str) -> None:
        if stage not in self._tasks:
            self._tasks[stage] = self._progress.add_task(stage, total=1.0)

    def move(self, stage: str, share: float) -> None:
        self._progress.update(self._tasks[stage], completed=share)
