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
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from glm_quant.artifact import full_disk_named, require_space
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import InputError, RunError
from glm_quant.quantize.jobs import check_open_outputs
from glm_quant.quantize.outputs import Outputs
from glm_quant.quantize.pipeline import Pipeline, Progress
from glm_quant.quantize.plan import Plan
from glm_quant.quantize.records import RemoteShard, ShardInputs, ShardRecord
from glm_quant.quantize.remaining import Wanted, running_pipeline
from glm_quant.quantize.reuse import ReuseStore
from glm_quant.quantize.same_source import keep_unchanged
from glm_quant.workspace import Workspace

__all__ = ["Conversion", "Progress", "RemoteShard", "ShardInputs", "ShardRecord", "Watcher"]


class Watcher(Protocol):
    """Is told that stages begin and move, such as a terminal."""

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

    Attributes:
        plan: what is made.
        outputs: the shards of the plan, and what of them is finished.
        reuse_store: where finished tensors may be that can be copied.
        workers: threads that encode.
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
        self.outputs = Outputs(checkpoint, plan, workspace)
        self.reuse_store = ReuseStore(workspace, reuse)
        self.workers = workers or os.cpu_count() or 1
        self._workspace = workspace
        self._ahead = ahead
        self._pipeline: Pipeline | None = None
        self._running = ExitStack()

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

    def check_space(self, evicting: bool = False, source_bytes: int = 0) -> None:
        """Compare what is left to write with the free space, and what is open with what may be.

        Args:
            evicting: finished shards leave this disk once a target has them.
            source_bytes: of the source, will stand beside them.

        Raises:
            DiskSpaceError: it does not fit.
            RecipeError: too many outputs would be open at a time.
        """
        check_open_outputs(self.outputs.most_open)
        needed = self.missing_bytes(evicting) + source_bytes
        require_space(self._workspace.root, needed, "the build")

    def missing_bytes(self, evicting: bool = False) -> int:
        """Return how many bytes of outputs are still to be written.

        Args:
            evicting: finished shards leave this disk once a target has them.
        """
        shards = sorted(
            shard.size_bytes - _allocated(self._workspace.partial / f"{shard.name}.part")
            for shard in (self.plan.shards[i] for i in self.outputs.unfinished())
        )
        if evicting:  # those that are open, and one that is uploaded while the next is made
            shards = shards[-self.outputs.most_open - 1 :]
        return sum(shards)

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
        record = self.outputs.finished(shard)
        if record is not None:
            return record
        if self.plan.uncalibrated:
            self.outputs.checkpoint.require_weights()
            raise RunError(
                f"{self.plan.shards[shard].name}: the recipe wants a calibration, and it was not "
                "made. `glm-quant run` and `glm-quant convert` make it; or make a folder with "
                "`glm-quant calibrate --factors` and name it as the recipe's `imatrix`."
            )
        with full_disk_named(self._workspace.root):
            try:
                pipeline = self._pipeline_for(shard)
                if pipeline is None:
                    return self.complete(shard, progress)
                return pipeline.wait(shard, progress)
            # ^C too: threads must not go on writing once the caller has given up.
            except BaseException:
                self.close()
                raise
            finally:
                if not self._ahead:
                    self.close()

    def close(self) -> None:
        """Stop working ahead; what was encoded is kept."""
        # Forgotten first: closing may fail, and must not be tried on the same pipeline again.
        self._pipeline = None
        self._running.close()

    def clean(self) -> None:
        """Remove partial outputs, earlier ones and source shards once every shard is finished."""
        self.close()
        for folder in (self._workspace.partial, self._workspace.previous, self._workspace.source):
            if folder.exists():
                shutil.rmtree(folder)

    def _pipeline_for(self, shard: int) -> Pipeline | None:
        """Return the pipeline that makes an output, or None if it turned out to be finished."""
        if self._pipeline is not None and shard in self._pipeline.outputs:
            return self._pipeline
        self.close()
        keep_unchanged(self.outputs)
        reusable = self.reuse_store.reusable(self.outputs, self.outputs.unfinished())
        # Asked again: the store may have given some outputs that were finished another name.
        unfinished = self.outputs.unfinished()
        if shard not in unfinished:
            return None
        completed = [shard]
        if self._ahead:  # from this one on, then whatever was passed over
            completed = [i for i in unfinished if i >= shard] + [i for i in unfinished if i < shard]
        wanted = Wanted(unfinished, completed, reusable)
        self._pipeline = self._running.enter_context(
            running_pipeline(self.outputs, wanted, self.workers)
        )
        return self._pipeline


def _allocated(path: Path) -> int:
    """Return how many bytes of a sparse file are on the disk already (POSIX blocks have 512)."""
    return min(path.stat().st_size, path.stat().st_blocks * 512) if path.exists() else 0
