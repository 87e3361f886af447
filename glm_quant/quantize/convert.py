"""The conversion engine: source shards stream by once, each row goes to its place in an output.

While a source shard is at hand, every job that reads it is done, also for outputs further on; then
it is forgotten. So outputs fill in order, few are open at a time, and nothing waits in memory. What
is durable is journaled: a run that dies goes on from its last journaled job.
"""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
from pydantic import BaseModel, ConfigDict

from glm_quant.artifact import FileDigest, Record, full_disk_named, require_space
from glm_quant.checkpoint.header import ITEM_SIZE
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import InputError, IntegrityError
from glm_quant.fingerprint import fingerprint
from glm_quant.quantize.encode import VERSION
from glm_quant.quantize.jobs import Job, by_source_shard, encode_job, make_jobs
from glm_quant.quantize.journal import Entry, Piece
from glm_quant.quantize.partial import PartialOutputs
from glm_quant.quantize.plan import Plan
from glm_quant.recipe import Recipe
from glm_quant.workspace import Workspace

_log = logging.getLogger(__name__)

# How many written bytes may be lost to a crash: they are the work that is done again.
_FLUSH_BYTES = 256 << 20

# Called with (done, total), in any unit.
Progress = Callable[[int, int], None]


class Watcher(Protocol):
    """Whoever wants to see stages begin and move: a terminal."""

    def begin(self, stage: str) -> None:
        """Note that a stage, or one more part of it, begins."""
        ...

    def move(self, stage: str, done: int, total: int) -> None:
        """Note how much of the current part is done."""
        ...


class ShardInputs(BaseModel):
    """Everything that decides the bytes of an output shard: what its fingerprint is made of.

    Attributes:
        version: of the encoder.
        layout: sha256 of the shard's header.
        schemes: of each weight that has a tensor in the shard, with its quantizer.
        sources: identity of each source shard that it draws on.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    layout: str
    schemes: dict[str, str]
    sources: dict[str, str]


class ShardRecord(Record):
    """A finished output shard.

    Attributes:
        inputs: what the fingerprint was made of, so that a change can be named.
        tensors: sha256 of each tensor's bytes.
        sources: for each source tensor, the sha256 of the row blocks that were read, in order.
    """

    inputs: ShardInputs
    tensors: dict[str, str]
    sources: dict[str, list[str]]


class KeptElsewhere(Record):
    """A finished shard whose local copy was let go: its bytes are at `target`, proved there."""

    target: str


class Conversion:
    """One plan being carried out in one workspace, whose lock the caller holds."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        recipe: Recipe,
        plan: Plan,
        workspace: Workspace,
        workers: int | None = None,
    ) -> None:
        """Prepare; nothing is read or written yet.

        Args:
            checkpoint: the source.
            recipe: what the plan was made from.
            plan: what to make.
            workspace: where to make it.
            workers: threads that encode (default: one a core). The bytes do not depend on it.

        Raises:
            InputError: `workers` is less than one.
        """
        if workers is not None and workers < 1:
            raise InputError(f"{workers} workers cannot work; give at least 1.")
        self.plan = plan
        self._checkpoint = checkpoint
        self._workspace = workspace
        self._workers = workers or os.cpu_count() or 1
        self._jobs = make_jobs(plan)
        self._jobs_of: list[list[Job]] = [[] for _ in plan.shards]
        for job in self._jobs:
            for shard in job.shards:
                self._jobs_of[shard].append(job)
        self._recipe = recipe

    @cached_property
    def _inputs(self) -> list[ShardInputs]:
        self._checkpoint.require_weights()
        return [self._shard_inputs(shard) for shard in range(len(self.plan.shards))]

    def fingerprint(self, shard: int) -> str:
        """Return the fingerprint of an output shard: of everything that decides its bytes."""
        return fingerprint(self._inputs[shard].model_dump())

    def record_path(self, shard: int) -> Path:
        """Return where the record of an output shard stands."""
        return self._workspace.records / "shards" / f"{self.plan.shards[shard].name}.json"

    def finished(self, shard: int) -> ShardRecord | None:
        """Return the record of an output shard if it is today's and the file is there."""
        record = ShardRecord.load(self.record_path(shard))
        if record is None or not all(map(self.is_kept, record.outputs)):
            return None
        if record.fingerprint != self.fingerprint(shard):
            today, then = self._inputs[shard].model_dump(), record.inputs.model_dump()
            drifted = [key for key in today if today[key] != then[key]]
            name = self.plan.shards[shard].name
            _log.info("%s is made again: %s changed", name, ", ".join(drifted))
            return None
        return record

    def elsewhere_path(self, name: str) -> Path:
        """Return where it stands that a shard's local copy was let go."""
        return self._workspace.records / "shards" / f"{name}.elsewhere.json"

    def is_kept(self, file: FileDigest) -> bool:
        """Whether a finished file is here, or is a shard that was let go and is kept elsewhere."""
        if file.is_there(self._workspace.checkpoint):
            return True
        elsewhere = KeptElsewhere.load(self.elsewhere_path(file.path))
        return elsewhere is not None and elsewhere.outputs == [file]

    def check_space(self) -> None:
        """Compare what is left to write with the free space.

        Raises:
            DiskSpaceError: it does not fit.
        """
        left = sum(
            shard.size_bytes - _allocated(self._workspace.partial / f"{shard.name}.part")
            for i, shard in enumerate(self.plan.shards)
            if self.finished(i) is None
        )
        require_space(self._workspace.root, left, "the build")

    def complete(self, shard: int, progress: Progress | None = None) -> ShardRecord:
        """Bring one output shard to completion, or return its record if it is finished.

        Args:
            shard: which one.
            progress: called with (bytes of source read, bytes of source to read).

        Raises:
            WeightError: a source value is NaN, Inf or does not fit its target dtype.
            IntegrityError: a byte changed between writing and finishing.
        """
        record = self.finished(shard)
        if record is not None:
            return record
        every = range(len(self.plan.shards))
        unfinished = {i for i in every if self.finished(i) is None}
        whole = fingerprint([self.fingerprint(i) for i in every])
        with full_disk_named(self._workspace.root):
            partial = PartialOutputs(self._workspace.partial, self.plan.shards, whole)
            with closing(partial) as outputs:
                for i in unfinished:
                    if not outputs.is_intact(i):
                        self._forget(outputs, i)
                try:
                    self._fill(outputs, shard, unfinished, progress)
                except BaseException:
                    self._checkpoint.source.expect(())
                    raise
                return self._finish(outputs, shard)

    def clean(self) -> None:
        """Remove what is left of partial outputs and of the source once every shard is finished."""
        for path in self._workspace.partial.glob("*"):
            path.unlink()
        if self._workspace.partial.exists():
            self._workspace.partial.rmdir()
        if self._workspace.source.exists():
            shutil.rmtree(self._workspace.source)

    def _shard_inputs(self, shard: int) -> ShardInputs:
        jobs = self._jobs_of[shard]
        weight_map, files = self._checkpoint.index.weight_map, self._checkpoint.files
        schemes = {
            target.weight.weight.name: target.weight.describe()
            for job in jobs
            for target in job.targets
            if any(tensor.shard == shard for tensor in target.weight.tensors)
        }
        sources = sorted({weight_map[job.source] for job in jobs})
        return ShardInputs(
            version=VERSION,
            layout=hashlib.sha256(self.plan.shards[shard].header).hexdigest(),
            schemes=schemes,
            sources={name: files[name].identity for name in sources},
        )

    def _forget(self, outputs: PartialOutputs, shard: int) -> None:
        outputs.forget(shard, {job.key for job in self._jobs_of[shard]})

    def _fill(
        self,
        outputs: PartialOutputs,
        shard: int,
        unfinished: set[int],
        progress: Progress | None,
    ) -> None:
        """Do every job that an output still needs, and whatever else its sources allow."""
        weight_map = self._checkpoint.index.weight_map
        needed = {weight_map[j.source] for j in self._jobs_of[shard] if j.key not in outputs.done}
        todo = [
            job
            for job in self._jobs
            if weight_map[job.source] in needed
            and job.key not in outputs.done
            and job.shards & unfinished
        ]
        for i in {i for job in todo for i in job.shards & unfinished}:
            outputs.open(i)
        total, done = sum(self._source_bytes(job) for job in todo), 0
        source = self._checkpoint.source
        source.expect(self._order(outputs, shard, unfinished))
        with ThreadPoolExecutor(self._workers, thread_name_prefix="encode") as pool:
            for name, jobs in by_source_shard(todo, weight_map).items():
                path = source.acquire(name)
                futures = {pool.submit(self._do, outputs, unfinished, path, j): j for j in jobs}
                for entry, job in _in_turn(futures):
                    outputs.finish_job(entry)
                    done += self._source_bytes(job)
                    if outputs.unflushed_bytes >= _FLUSH_BYTES:
                        outputs.flush()
                    if progress:
                        progress(done, total)
                outputs.flush()
                source.release(name)

    def _order(self, outputs: PartialOutputs, first: int, unfinished: set[int]) -> list[str]:
        """Return the source shards that are still needed: for one output, then for the others."""
        weight_map = self._checkpoint.index.weight_map
        ahead: dict[str, None] = {}
        for i in [first, *sorted(unfinished - {first})]:
            left = (job for job in self._jobs_of[i] if job.key not in outputs.done)
            ahead |= dict.fromkeys(sorted({weight_map[job.source] for job in left}))
        return list(ahead)

    def _finish(self, outputs: PartialOutputs, shard: int) -> ShardRecord:
        """Check a filled output, give it its final name, and record it."""
        try:
            digest, tensors = outputs.check(shard)
        except IntegrityError as error:
            self._forget(outputs, shard)
            raise IntegrityError(
                f"{error} The partial shard was removed; run again to make it anew, and check the "
                "disk if this repeats."
            ) from None
        sources: dict[str, list[str]] = {}
        for job in self._jobs_of[shard]:
            sources.setdefault(job.source, []).append(outputs.done[job.key].source_sha256)
        # A manifest says that the output is whole; from here on it speaks of an earlier one.
        (self._workspace.checkpoint / MANIFEST_NAME).unlink(missing_ok=True)
        outputs.publish(shard, self._workspace.checkpoint)
        record = ShardRecord(
            fingerprint=self.fingerprint(shard),
            outputs=[digest],
            inputs=self._inputs[shard],
            tensors=tensors,
            sources=sources,
        )
        record.save(self.record_path(shard))
        return record

    def _do(self, outputs: PartialOutputs, unfinished: set[int], path: Path, job: Job) -> Entry:
        """Read a job's rows, encode them for each target, write them. Runs in a worker thread."""
        info = self._checkpoint.tensors[job.source]
        where = f"{info.shard}: tensor {job.source}"
        size = self._source_bytes(job)
        begin = info.begin + job.begin_row * job.width * ITEM_SIZE[info.dtype]
        data = np.fromfile(path, np.uint8, count=size, offset=begin)
        if data.size != size:
            raise IntegrityError(
                f"{where}: {size:,} bytes were expected, {data.size:,} could be read. The file "
                "changed while it was used; fetch it again."
            )
        pieces: list[Piece] = []
        for tensor, first_row, made in encode_job(job, data, info, self.plan.geometry, unfinished):
            pieces.append(outputs.write(tensor, first_row, made))
        return Entry(job.key, hashlib.sha256(data.data).hexdigest(), tuple(pieces))

    def _source_bytes(self, job: Job) -> int:
        item_size = ITEM_SIZE[self._checkpoint.tensors[job.source].dtype]
        return (job.end_row - job.begin_row) * job.width * item_size


def _in_turn(futures: dict[Future[Entry], Job]) -> Iterator[tuple[Entry, Job]]:
    """Yield finished jobs as they come; on any failure drop those that have not begun."""
    try:
        for future in as_completed(futures):
            yield future.result(), futures[future]
    except BaseException:
        for future in futures:
            future.cancel()
        raise


def _allocated(path: Path) -> int:
    """Return how many bytes of a sparse file are on the disk already (POSIX blocks have 512)."""
    return min(path.stat().st_size, path.stat().st_blocks * 512) if path.exists() else 0
