"""The conversion engine: source shards stream by once, each row goes to its place in an output.

While a source shard is at hand, every job that reads it is done, also for outputs further on; then
it is forgotten. Source shards are taken in the order in which outputs need them, which is the one
in which they are stored: outputs fill in order, few are open at a time, nothing waits in memory.
What is durable is journaled: a run that dies goes on from its last journaled job. What was made
before, for another recipe or another revision, is copied.
"""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from glm_quant.artifact import FileDigest, full_disk_named, require_space
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import InputError, RunError
from glm_quant.quantize.ahead import Ahead
from glm_quant.quantize.batch import Batch
from glm_quant.quantize.ledger import Ledger
from glm_quant.quantize.pipeline import Progress
from glm_quant.quantize.plan import Plan
from glm_quant.quantize.records import KeptElsewhere, ShardInputs, ShardRecord
from glm_quant.quantize.reuse import Shelf
from glm_quant.quantize.schedule import Schedule
from glm_quant.workspace import Workspace

__all__ = ["Conversion", "KeptElsewhere", "Progress", "ShardInputs", "ShardRecord", "Watcher"]


class Watcher(Protocol):
    """Whoever wants to see stages begin and move: a terminal."""

    def begin(self, stage: str) -> None:
        """Note that a stage, or one more part of it, begins."""
        ...

    def move(self, stage: str, done: int, total: int) -> None:
        """Note how much of the current part is done."""
        ...


class Conversion:
    """One plan being carried out in one workspace, whose lock the caller holds.

    Outside of a `with` block `complete` does what one output needs and stops. Inside of one it
    starts to work ahead on all outputs, in threads, until the block ends.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        plan: Plan,
        workspace: Workspace,
        workers: int | None = None,
        reuse: Sequence[Workspace] = (),
        ahead: bool = False,
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            checkpoint: the source.
            plan: what to make.
            workspace: where to make it.
            workers: threads that encode (default: one a core). The bytes do not depend on it.
            reuse: other workspaces whose finished tensors may be copied.
            ahead: work ahead as in a `with` block, until `close`.

        Raises:
            InputError: `workers` is less than one.
        """
        if workers is not None and workers < 1:
            raise InputError(f"{workers} workers cannot work; give at least 1.")
        self.plan = plan
        self._workspace = workspace
        self._workers = workers or os.cpu_count() or 1
        self._ledger = Ledger(checkpoint, plan, workspace)
        self._shelf = Shelf(workspace, reuse)
        self._ahead = ahead
        self._batch: Batch | None = None

    def __enter__(self) -> Self:
        """Work ahead from the first `complete` on."""
        self._ahead = True
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop working; what was encoded is kept."""
        self._ahead = False
        self.close()

    def fingerprint(self, shard: int) -> str:
        """Return the fingerprint of an output shard: of everything that decides its bytes."""
        return self._ledger.fingerprint(shard)

    def layout(self, shard: int) -> str:
        """Return the fingerprint of an output shard without its calibration: known before that."""
        return self._ledger.layout(shard)

    def record_path(self, shard: int) -> Path:
        """Return where the record of an output shard stands."""
        return self._ledger.record_path(shard)

    def finished(self, shard: int) -> ShardRecord | None:
        """Return the record of an output shard if it is today's and the file is there."""
        return self._ledger.finished(shard)

    def elsewhere_path(self, name: str) -> Path:
        """Return where it stands that a shard's local copy was let go."""
        return self._ledger.elsewhere_path(name)

    def is_kept(self, file: FileDigest) -> bool:
        """Whether a finished file is here, or is a shard that was let go and is kept elsewhere."""
        return self._ledger.is_kept(file)

    @property
    def schedule(self) -> Schedule:
        """In which order source shards are read, and what that takes."""
        return self._ledger.schedule

    def check_space(self, let_go: bool = False, source_bytes: int = 0) -> None:
        """Compare what is left to write with the free space, and what is open with what may be.

        Args:
            let_go: finished shards do not stay here.
            source_bytes: of the source, will stand beside them.

        Raises:
            DiskSpaceError: it does not fit.
            RecipeError: too many outputs would be open at a time.
        """
        self.schedule.check()
        left = sorted(
            shard.size_bytes - _allocated(self._workspace.partial / f"{shard.name}.part")
            for shard in (self.plan.shards[i] for i in self._ledger.unfinished())
        )
        if let_go:  # those that are open, and one that is uploaded while the next is made
            left = left[-self.schedule.open_outputs - 1 :]
        require_space(self._workspace.root, sum(left) + source_bytes, "the build")

    def complete(self, shard: int, progress: Progress | None = None) -> ShardRecord:
        """Bring one output shard to completion, or return its record if it is finished.

        Args:
            shard: which one.
            progress: called with (bytes of source read, bytes of source to read).

        Raises:
            WeightError: a source value is NaN, Inf or does not fit its target dtype, a tensor is
                all zero or the same as another, or its codes are too far from it.
            IntegrityError: a byte changed between writing and finishing.
            RunError: the recipe's calibration was not made.
        """
        record = self.finished(shard)
        if record is not None:
            return record
        if self.plan.uncalibrated:
            self._ledger.checkpoint.require_weights()
            raise RunError(
                f"{self.plan.shards[shard].name}: the recipe wants a calibration, and it was not "
                "made. `glm-quant run` and `glm-quant convert` make it; or make a folder with "
                "`glm-quant calibrate --factors` and name it as the recipe's `imatrix`."
            )
        with full_disk_named(self._workspace.root):
            try:
                batch = self._batch_for(shard)
                return batch.wait(shard, progress) if batch else self.complete(shard, progress)
            except BaseException:
                self.close()
                raise
            finally:
                if not self._ahead:
                    self.close()

    def ahead(self, near: Checkpoint) -> Ahead:
        """Return the partial outputs, to be filled while the calibration is made.

        Args:
            near: the checkpoint, with a source that hands out what is at hand.
        """
        self.close()
        return Ahead(self._ledger, self._shelf, near, self._workers)

    def close(self) -> None:
        """Stop working ahead; what was encoded is kept."""
        if self._batch is not None:
            batch, self._batch = self._batch, None
            batch.close()

    def clean(self) -> None:
        """Remove partial outputs, earlier ones and source shards once every shard is finished."""
        self.close()
        for folder in (self._workspace.partial, self._workspace.previous, self._workspace.source):
            if folder.exists():
                shutil.rmtree(folder)

    def _batch_for(self, shard: int) -> Batch | None:
        """Return the batch that makes an output, or None if it turned out to be finished."""
        if self._batch is not None and self._batch.brings(shard):
            return self._batch
        self.close()
        donors = self._shelf.donors(self._ledger, self._ledger.unfinished())
        unfinished = self._ledger.unfinished()  # some may only have got another name
        if shard not in unfinished:
            return None
        # From this one on, then whatever was passed over.
        wanted = [i for i in unfinished if i >= shard] + [i for i in unfinished if i < shard]
        wanted = wanted if self._ahead else [shard]
        self._batch = Batch(self._ledger, unfinished, wanted, donors, self._workers)
        return self._batch


def _allocated(path: Path) -> int:
    """Return how many bytes of a sparse file are on the disk already (POSIX blocks have 512)."""
    return min(path.stat().st_size, path.stat().st_blocks * 512) if path.exists() else 0
