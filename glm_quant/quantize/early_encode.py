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
from glm_quant.quantize.convert import Conversion
from glm_quant.quantize.job_runner import JobRunner
from glm_quant.quantize.jobs import Job, by_source_shard, make_jobs
from glm_quant.quantize.layout import PlannedWeight
from glm_quant.quantize.outputs import weight_key
from glm_quant.quantize.partial import PartialOutputs
from glm_quant.quantize.pipeline import Pipeline, Step


class EarlyEncoder:
    """Fills the partial outputs of a plan weight by weight. Close it, whatever happens."""

    def __init__(self, conversion: Conversion, window: Checkpoint) -> None:
        """Open the partial outputs.

        Args:
            conversion: of the plan, its calibration not known yet; it stops working ahead.
            window: the checkpoint, with a source that hands out what is at hand.
        """
        conversion.close()  # only one may write to the partial outputs
        self._outputs, self._workers = conversion.outputs, conversion.workers
        self._window = window
        self._plan = conversion.plan
        self._reusable_keys = conversion.reuse_store.keys()
        self._shards = range(len(self._plan.shards))
        self._partial = PartialOutputs(
            self._outputs.workspace.partial, self._plan.shards, self._outputs.whole_layout
        )
        for shard in self._shards:
            if not self._partial.is_intact(shard):
                self._partial.forget(shard, ())
        # What equals a tensor of a finished output is found by the conversion.
        self._runner = JobRunner(self._outputs, self._partial, (), window)

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
        self._partial.close()

    def pending_jobs(self, weights: Sequence[PlannedWeight]) -> list[Job]:
        """Return the jobs of some weights, with their calibration, that are not done yet.

        A weight that some finished output has is left to the conversion, which copies it.
        """
        copied = {
            planned.weight.name
            for planned in weights
            if weight_key(planned, self._window) in self._reusable_keys
        }
        return [
            job
            for job in self._jobs(weights)
            if job.key not in self._partial.done
            and not all(target.weight.weight.name in copied for target in job.targets)
        ]

    def is_encoded(self, weights: Sequence[PlannedWeight]) -> bool:
        """Whether all of some weights is encoded here."""
        return all(job.key in self._partial.done for job in self._jobs(weights))

    def checkpoint(self, config: dict[str, Any]) -> Checkpoint:
        """Return the partial outputs as a build: what is not encoded yet has no values.

        Args:
            config: of the build.
        """
        build = copy(self._window)
        build.source = FolderSource(self._outputs.workspace.partial)
        build.config = config
        build.tensors = {
            t.name: TensorInfo(
                t.name, t.dtype, t.shape, f"{shard.name}.part", t.offset, t.offset + t.size_bytes
            )
            for shard in self._plan.shards
            for t in shard.tensors
        }
        return build

    def encode(self, weights: Sequence[PlannedWeight]) -> None:
        """Do the pending jobs; when this returns, what was written is durable.

        Raises:
            WeightError: see `Conversion.complete`.
            DiskSpaceError: the disk is nearly full.
        """
        jobs = self.pending_jobs(weights)
        if not jobs:
            return
        tensors = {t.name for job in jobs for to in job.targets for t in to.weight.tensors}
        # Codes of an earlier calibration in the same places stop counting before they are replaced.
        self._partial.make_way(tensors, {job.key for job in self._jobs(weights)})
        by_shard = by_source_shard(jobs, self._window.index.weight_map)
        steps = [
            Step(shard, [self._runner.work_item(job, self._shards) for job in shard_jobs])
            for shard, shard_jobs in by_shard.items()
        ]
        pipeline = Pipeline(
            self._window.source,
            self._partial,
            steps,
            {},
            lambda _shard, _full: None,
            self._outputs.workspace.root,
        )
        pipeline.start(self._workers)
        try:
            pipeline.drain()
        finally:
            pipeline.stop()
            # Files are closed between layers: a plan may have more outputs than a process may open.
            self._partial.rest()

    def _jobs(self, weights: Sequence[PlannedWeight]) -> list[Job]:
        return make_jobs(replace(self._plan, weights=tuple(weights)))
