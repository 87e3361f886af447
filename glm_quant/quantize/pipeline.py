"""Reading, encoding, writing, making durable and finishing, all at the same time.

A reader takes source shards one after the other and hands out their jobs; encoders, one a core, do
them; a flusher makes their bytes durable and journals them, then lets the source shard go; a
finisher reads each full output once more and publishes it. A caller waits for one output at a time.
Nothing but source shards is held back: a job's bytes live in its encoder only.

Any failure stops everything: what was encoded is still flushed, and the failure is raised where an
output is waited for. All threads are daemons: a killed process leaves what the journal says, and no
more.
"""

import queue
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from dataclasses import dataclass, field
from pathlib import Path

from glm_quant.artifact import require_space
from glm_quant.checkpoint.source import Source
from glm_quant.errors import IntegrityError, RunError
from glm_quant.quantize.journal import Entry
from glm_quant.quantize.partial import PartialOutputs
from glm_quant.quantize.records import ShardRecord

# How many written bytes may be lost to a crash, besides those that are being encoded or flushed;
# and which share of an output, so that it is never a whole one.
_FLUSH_BYTES = 128 << 20
_FLUSH_SHARE = 8
# Source shards whose jobs are handed out at a time: the next one hides the last one's flush.
_SHARDS_IN_USE = 3
# Stopping at an almost full disk is better than filling it: other programs live there too.
_SPARE_BYTES = 256 << 20
_SPARE_SHARE = 100

# Called with (done, total), in any unit.
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class WorkItem:
    """A piece of work.

    Attributes:
        key: what the journal calls it.
        shards: outputs that need it.
        size_bytes: what it reads.
        source: the source shard that it reads, or None if it reads something else.
        run: does it, given the path of the source shard, and says what it wrote.
    """

    key: str
    shards: frozenset[int]
    size_bytes: int
    source: str | None
    run: Callable[[Path | None], Entry]


@dataclass
class Step:
    """The items that read one source shard; `source` is None for those that read something else.

    Attributes:
        pending: how many of them are not encoded yet.
    """

    source: str | None
    items: list[WorkItem]
    pending: int = field(init=False)

    def __post_init__(self) -> None:
        self.pending = len(self.items)


class Pipeline:
    """Brings some output shards to completion.

    Attributes:
        broken: the output whose bytes are not what was written, if there is one.
    """

    def __init__(
        self,
        source: Source,
        partial: PartialOutputs,
        steps: Sequence[Step],
        needs: Mapping[int, set[str]],
        finish: Callable[[int, bool], ShardRecord | None],
        folder: Path,
    ) -> None:
        """Prepare; nothing is read yet.

        Args:
            source: where the steps' shards come from.
            partial: where bytes go.
            steps: in the order in which they are done.
            needs: for each output to finish, the keys of the items that are not journaled yet.
            finish: given an output and whether it is full, checks what is there of it, and
                publishes and records it if it is.
            folder: on the disk that is written to.
        """
        self._source, self._partial, self._folder = source, partial, folder
        self._steps = list(steps)
        self._needs = {shard: set(keys) for shard, keys in needs.items()}
        self._finish = finish
        self._flush_bytes = min(_FLUSH_BYTES, partial.largest_bytes // _FLUSH_SHARE)
        self._items = queue.SimpleQueue[tuple[Step, WorkItem, Path | None] | None]()
        # Outputs for the finisher: (which, whether it is full).
        self._filled = queue.SimpleQueue[tuple[int, bool] | None]()
        self._changed = threading.Condition()
        self._in_use: list[Step] = []
        self._handed_out = self._stopped = False
        self._failure: BaseException | None = None
        self._records: dict[int, ShardRecord] = {}
        # Source bytes for each output to finish: those that were read, and all.
        self._done = Counter[int]()
        self._total = Counter[int]()
        for item in (item for step in self._steps for item in step.items):
            self._total.update(dict.fromkeys(item.shards & self._needs.keys(), item.size_bytes))
        self._threads: list[threading.Thread] = []
        self.broken: int | None = None

    def start(self, encoders: int) -> None:
        """Begin."""
        for shard, keys in self._needs.items():
            if not keys:
                self._filled.put((shard, True))
        work = [self._hand_out, self._flush, self._finish_full, *[self._encode] * encoders]
        for run in work:
            # In the caller's context, so that log lines find the run they belong to.
            thread = threading.Thread(
                target=copy_context().run, args=(self._guarded, run), name="convert", daemon=True
            )
            self._threads.append(thread)
            thread.start()

    @property
    def outputs(self) -> set[int]:
        """The output shards that it brings to completion."""
        return set(self._needs)

    def wait(self, shard: int, progress: Progress | None = None) -> ShardRecord:
        """Return an output's record as soon as it is finished.

        Args:
            shard: one of `outputs`.
            progress: called in this thread with (bytes read, bytes to read) for this output.

        Raises:
            GlmQuantError: whatever stopped the pipeline.
        """
        reported = -1
        while True:
            with self._changed:
                record, failure = self._records.get(shard), self._failure
                done, total = self._done[shard], self._total[shard]
                if record is None and failure is None and not self._stopped and done == reported:
                    self._changed.wait(timeout=1.0)
                    continue
            if progress and done != reported and total:
                progress(done, total)
            reported = done
            if record is not None:
                return record
            if failure is not None:
                self.stop()
                raise failure
            if self._stopped:
                raise RunError("The conversion was stopped; run the same command again to go on.")

    def drain(self) -> None:
        """Wait until every item is done and what it wrote is durable; then the threads have ended.

        Raises:
            GlmQuantError: whatever stopped the pipeline.
        """
        with self._changed:
            while not self._stopped and not (self._handed_out and not self._in_use):
                self._changed.wait(timeout=1.0)  # so that a signal is heard
            failure = self._failure
        self.stop()
        if failure is not None:
            raise failure

    def stop(self) -> None:
        """End all threads; what was encoded is flushed."""
        with self._changed:
            ended = len(self._records) == len(self._needs)
            self._stopped = True
            self._changed.notify_all()
        if not ended:
            # The reader may wait for a source shard; it is told that none is expected any more.
            self._source.expect(())
        # One for each thread is enough, whichever of them are encoders.
        for _ in self._threads:
            self._items.put(None)
        self._filled.put(None)
        for thread in self._threads:
            thread.join()
        self._threads.clear()

    def _guarded(self, run: Callable[[], None]) -> None:
        try:
            run()
        except BaseException as error:
            with self._changed:
                # The first failure is the cause; what follows from stopping is not one.
                if self._failure is None and not self._stopped:
                    self._failure = error
                self._stopped = True
                self._changed.notify_all()
            self._source.expect(())

    def _hand_out(self) -> None:
        places = self._source.places or _SHARDS_IN_USE
        for step in self._steps:
            with self._changed:
                # A step counts until it is flushed: only then may its source shard be evicted.
                self._changed.wait_for(
                    lambda: self._stopped or len(self._in_use) < min(places, _SHARDS_IN_USE)
                )
                if self._stopped:
                    return
                self._in_use.append(step)
            _require_spare_space(self._folder)
            path = None if step.source is None else self._source.acquire(step.source)
            for shard in sorted({shard for item in step.items for shard in item.shards}):
                self._partial.open(shard)
            for item in step.items:
                self._items.put((step, item, path))
        with self._changed:
            self._handed_out = True
            self._changed.notify_all()

    def _encode(self) -> None:
        while (handed := self._items.get()) is not None and not self._stopped:
            step, item, path = handed
            entry = item.run(path)
            with self._changed:
                self._partial.finish_job(entry)
                step.pending -= 1
                self._done.update(dict.fromkeys(item.shards & self._needs.keys(), item.size_bytes))
                self._changed.notify_all()
                # A slow disk must not let more and more bytes wait to be made durable.
                self._changed.wait_for(
                    lambda: self._stopped or self._partial.unflushed_bytes < 2 * self._flush_bytes
                )

    def _flush(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._something_to_flush)
                encoded = [step for step in self._in_use if step.pending == 0]
                ended = self._stopped or (self._handed_out and len(encoded) == len(self._in_use))
            batch = self._partial.flush()
            # Before the reader hears that there is room for another one: the source counts them.
            for step in encoded:
                if step.source is not None and not self._stopped:
                    self._source.release(step.source)
            with self._changed:
                # Not full yet, but what is complete of it can be read again meanwhile.
                for shard in {piece.shard for entry in batch for piece in entry.pieces}:
                    if shard in self._needs:
                        self._filled.put((shard, False))
                for entry in batch:
                    self._count(entry.job)
                self._in_use = [step for step in self._in_use if step not in encoded]
                self._changed.notify_all()
            if ended:
                return

    def _something_to_flush(self) -> bool:
        return (
            self._stopped
            or self._partial.unflushed_bytes >= self._flush_bytes
            or any(step.pending == 0 for step in self._in_use)
            or (self._handed_out and not self._in_use)
        )

    def _count(self, key: str) -> None:
        for shard, keys in self._needs.items():
            if key in keys:
                keys.remove(key)
                if not keys:
                    self._filled.put((shard, True))

    def _finish_full(self) -> None:
        while len(self._records) < len(self._needs):
            filled = self._filled.get()
            if filled is None or self._stopped:
                return
            try:
                record = self._finish(*filled)
            except IntegrityError:
                self.broken = filled[0]
                raise
            if record is not None:
                with self._changed:
                    self._records[filled[0]] = record
                    self._changed.notify_all()


def _require_spare_space(folder: Path) -> None:
    """Stop while there is still a little room.

    Raises:
        DiskSpaceError: there is not.
    """
    total = shutil.disk_usage(folder).total
    # A share, so that small test disks and memory disks are not refused.
    require_space(folder, min(_SPARE_BYTES, total // _SPARE_SHARE), "going on")
