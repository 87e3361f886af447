"""Weights are encoded as soon as they may be, before all of a plan's calibration is known.

Every output byte has its place before that, so codes go where the conversion will want them and
nothing is copied: into the partial outputs, journaled as the conversion's own jobs are. It finds
them done, or does them itself; a job's key says with which calibration it was done.
"""

from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from types import TracebackType
from typing import Any, Self

from glm_quant.checkpoint.header import TensorInfo
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.checkpoint.source import FolderSource
from glm_quant.quantize.jobs import Job, by_source_shard, make_jobs
from glm_quant.quantize.ledger import Ledger, weight_key
from glm_quant.quantize.partial import PartialOutputs
from glm_quant.quantize.pipeline import Pipeline, Step
from glm_quant.quantize.plan import PlannedWeight
from glm_quant.quantize.reuse import Shelf
from glm_quant.quantize.worker import Worker


class Ahead:
    """Partial outputs of a plan, filled weight by weight. Close it, whatever happens."""

    def __init__(self, ledger: Ledger, shelf: Shelf, near: Checkpoint, workers: int) -> None:
        """Open the partial outputs.

        Args:
            ledger: the plan, its calibration not known yet.
            shelf: where finished tensors may be: what was made is not made again.
            near: the checkpoint, with a source that hands out what is at hand.
            workers: threads that encode.
        """
        self._ledger, self._near, self._workers = ledger, near, workers
        self._plan = ledger.plan
        self._made = shelf.keys()
        self._shards = range(len(self._plan.shards))
        self._outputs = PartialOutputs(
            ledger.workspace.partial, self._plan.shards, ledger.whole_layout
        )
        for shard in self._shards:
            if not self._outputs.is_intact(shard):
                self._outputs.forget(shard, ())
        self._worker = Worker(ledger, self._outputs, (), near)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the outputs; what was encoded is kept."""
        self._outputs.close()

    def left(self, weights: Sequence[PlannedWeight]) -> list[Job]:
        """Return the jobs of some weights, with their calibration, that are not done yet.

        A weight that some finished output has is left to the conversion, which copies it.
        """
        made = {p.weight.name for p in weights if weight_key(p, self._near) in self._made}
        return [
            job
            for job in self._jobs(weights)
            if job.key not in self._outputs.done
            and not all(target.weight.weight.name in made for target in job.targets)
        ]

    def has(self, weights: Sequence[PlannedWeight]) -> bool:
        """Whether all of some weights is encoded here."""
        return all(job.key in self._outputs.done for job in self._jobs(weights))

    def checkpoint(self, config: dict[str, Any]) -> Checkpoint:
        """Return the partial outputs as a build: what is not encoded yet has no values.

        Args:
            config: of the build.
        """
        made = copy(self._near)
        made.source = FolderSource(self._ledger.workspace.partial)
        made.config = config
        made.tensors = {
            t.name: TensorInfo(
                t.name, t.dtype, t.shape, f"{shard.name}.part", t.offset, t.offset + t.size_bytes
            )
            for shard in self._plan.shards
            for t in shard.tensors
        }
        return made

    def encode(self, weights: Sequence[PlannedWeight]) -> None:
        """Do what is left; when this returns, what was written is durable.

        Raises:
            WeightError: see `Conversion.complete`.
            DiskSpaceError: the disk is nearly full.
        """
        jobs = self.left(weights)
        if not jobs:
            return
        tensors = {t.name for job in jobs for to in job.targets for t in to.weight.tensors}
        self._outputs.make_way(tensors, {job.key for job in self._jobs(weights)})
        by_shard = by_source_shard(jobs, self._near.index.weight_map)
        steps = [
            Step(shard, [self._worker.task(job, self._shards) for job in some])
            for shard, some in by_shard.items()
        ]
        pipeline = Pipeline(
            self._near.source,
            self._outputs,
            steps,
            {},
            lambda _shard, _full: None,
            self._ledger.workspace.root,
        )
        pipeline.start(self._workers)
        try:
            pipeline.drain()
        finally:
            pipeline.stop()
            self._outputs.rest()

    def _jobs(self, weights: Sequence[PlannedWeight]) -> list[Job]:
        return make_jobs(replace(self._plan, weights=tuple(weights)))
