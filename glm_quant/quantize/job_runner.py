"""Doing a job: its rows are read, looked at, encoded, and written where they belong.

Both passes over a plan use it: the one that makes whole outputs (`remaining`), and the one that
encodes each layer as soon as its calibration is known (`early_encode`).
"""

import threading
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.header import TensorInfo
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.fidelity import Fidelity
from glm_quant.errors import IntegrityError
from glm_quant.quantize.jobs import Job, block_of, encode_job
from glm_quant.quantize.journal import Entry, Piece
from glm_quant.quantize.load import load_parts, read_of
from glm_quant.quantize.outputs import Outputs
from glm_quant.quantize.partial import PartialOutputs
from glm_quant.quantize.pipeline import WorkItem
from glm_quant.quantize.records import ShardRecord
from glm_quant.quantize.sanity import SourceCheck


class JobRunner:
    """Does the jobs of a plan; several threads may use it."""

    def __init__(
        self,
        outputs: Outputs,
        partial: PartialOutputs,
        finished: Iterable[ShardRecord],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Tell the checks of source tensors what earlier runs have read.

        Args:
            outputs: those of the plan.
            partial: where bytes go.
            finished: records of the outputs that are whole.
            checkpoint: where rows are read; default: that of the outputs.
        """
        self._checkpoint = checkpoint or outputs.checkpoint
        self._partial = partial
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._check = SourceCheck(
            outputs.checkpoint.tensors,
            Counter(job.source for job in outputs.jobs),
            outputs.plan.allow,
        )
        sizes: dict[str, list[int]] = defaultdict(list)
        for job in sorted(outputs.jobs, key=lambda job: job.begin_row):
            sizes[job.source].append(job.size_bytes)
        for record in finished:
            for source, digests in record.sources.items():
                zero = all(map(self._check.is_of_zeros, digests, sizes[source]))
                self._check.add_tensor(source, digests, zero)
        blocks = {job.block: job for job in outputs.jobs}
        for entry in partial.done.values():
            # A journaled job of an earlier layout may have read blocks that no job reads now.
            if job := blocks.get(block_of(entry.job)):
                zero = self._check.is_of_zeros(entry.source_sha256, job.size_bytes)
                self._check.add_block(job.source, job.begin_row, entry.source_sha256, zero)

    def work_item(self, job: Job, shards: Collection[int]) -> WorkItem:
        """Return a job as the pipeline takes it.

        Args:
            job: what to do.
            shards: output shards that are wanted; what lies in others is left out.
        """
        return WorkItem(
            job.key,
            frozenset(job.shards.intersection(shards)),
            job.size_bytes,
            self._checkpoint.index.weight_map[job.source],
            lambda path: self._run(job, path, shards),
        )

    def _run(self, job: Job, path: Path | None, shards: Collection[int]) -> Entry:
        """Read a job's rows, encode them for each target, write them. Runs in an encoder."""
        shard = self._checkpoint.index.weight_map[job.source]
        read_source = read_of(self._checkpoint)

        def read(info: TensorInfo, begin: int, size: int) -> NDArray[np.uint8]:
            # The scales of an FP8 weight may lie in another source shard than the one at hand.
            if path is None or info.shard != shard:
                return read_source(info, begin, size)
            # The buffer holds one range; of several, the first is in use when the next is read.
            alone = len(job.parts) == 1 and job.parts[0][0].is_copy
            room = self._buffer(size) if alone else np.empty(size, np.uint8)
            return _read_file(path, info, begin, room)

        where = f"{shard}: tensor {job.source}"
        loaded = load_parts(job.parts, where, self._checkpoint, read)
        with self._lock:
            self._check.add_block(job.source, job.begin_row, loaded.sha256, loaded.all_zero)
        pieces: list[Piece] = []
        fidelity: dict[str, Fidelity] = {}
        for encoded in encode_job(job, loaded, shards):
            pieces += [self._partial.write(*written) for written in encoded.written]
            if encoded.fidelity:
                fidelity[encoded.weight.weight.name] = encoded.fidelity
        return Entry(job.key, loaded.sha256, tuple(pieces), fidelity)

    def _buffer(self, size: int) -> NDArray[np.uint8]:
        """Return this thread's buffer: new memory for each job costs more than the reading."""
        buffer: NDArray[np.uint8] | None = getattr(self._thread, "buffer", None)
        if buffer is None or buffer.size < size:
            buffer = self._thread.buffer = np.empty(size, np.uint8)
        return buffer[:size]


def _read_file(
    path: Path, info: TensorInfo, begin: int, room: NDArray[np.uint8]
) -> NDArray[np.uint8]:
    """Fill `room` with a tensor's bytes from `begin` on.

    Raises:
        IntegrityError: the file is shorter than its header said.
    """
    with path.open("rb", buffering=0) as file:
        file.seek(info.begin + begin)
        filled = 0
        # An unbuffered read may return less than it is asked for.
        while filled < room.size and (read := file.readinto(room[filled:].data)):
            filled += read
    if filled < room.size:
        raise IntegrityError(
            f"{info.shard}: tensor {info.name}: {room.size:,} bytes were expected, {filled:,} "
            "could be read. The file changed while it was used; fetch it again."
        )
    return room
