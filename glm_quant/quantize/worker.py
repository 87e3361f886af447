"""Doing a job: its rows are read, looked at, encoded, and written where they belong.

The passes over a plan share it: the one that makes whole outputs (`batch`), and the one that
encodes each layer as soon as its calibration is known (`ahead`).
"""

import threading
from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.header import ITEM_SIZE, TensorInfo
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.fidelity import Fidelity
from glm_quant.errors import IntegrityError
from glm_quant.quantize.jobs import Job, block_of, encode_job, load_job
from glm_quant.quantize.journal import Entry, Piece
from glm_quant.quantize.ledger import Ledger
from glm_quant.quantize.partial import PartialOutputs
from glm_quant.quantize.pipeline import Task
from glm_quant.quantize.records import ShardRecord
from glm_quant.quantize.sanity import Account


class Worker:
    """Does the jobs of a plan; several threads may use it."""

    def __init__(
        self,
        ledger: Ledger,
        outputs: PartialOutputs,
        finished: Iterable[ShardRecord],
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Take account of the source tensors that were read in earlier runs.

        Args:
            ledger: the plan.
            outputs: where bytes go.
            finished: records of the outputs that are whole.
            checkpoint: where rows are read; default: the ledger's.
        """
        self._geometry = ledger.plan.geometry
        self._checkpoint = checkpoint or ledger.checkpoint
        self._outputs = outputs
        self._thread = threading.local()
        self._lock = threading.Lock()
        self._account = Account(
            ledger.checkpoint.tensors, Counter(job.source for job in ledger.jobs)
        )
        for record in finished:
            for source, digests in record.sources.items():
                self._account.note_whole(source, digests)
        sizes = {job.block: (job.source, job.begin_row, self._size(job)) for job in ledger.jobs}
        for entry in outputs.done.values():
            if (block := block_of(entry.job)) in sizes:
                source, row, size = sizes[block]
                zero = self._account.is_of_zeros(entry.source_sha256, size)
                self._account.note(source, row, entry.source_sha256, zero)

    def task(self, job: Job, shards: Collection[int]) -> Task:
        """Return a job as the pipeline takes it.

        Args:
            job: what to do.
            shards: output shards that are wanted; what lies in others is left out.
        """
        return Task(
            job.key,
            frozenset(job.shards.intersection(shards)),
            self._size(job),
            self._checkpoint.index.weight_map[job.source],
            lambda path: self._do(job, path, shards),
        )

    def _size(self, job: Job) -> int:
        item_size = ITEM_SIZE[self._checkpoint.tensors[job.source].dtype]
        return (job.end_row - job.begin_row) * job.width * item_size

    def _do(self, job: Job, path: Path | None, shards: Collection[int]) -> Entry:
        """Read a job's rows, encode them for each target, write them. Runs in an encoder."""
        source, shard = self._checkpoint.source, self._checkpoint.index.weight_map[job.source]

        def read(info: TensorInfo, begin: int, size: int) -> NDArray[np.uint8]:
            if path is None or info.shard != shard:
                first = info.begin + begin
                return np.frombuffer(source.read(info.shard, first, first + size), np.uint8)
            room = self._buffer(size) if info.name == job.source else np.empty(size, np.uint8)
            return _read_file(path, info, begin, room)

        loaded = load_job(job, self._checkpoint, read)
        with self._lock:
            self._account.note(job.source, job.begin_row, loaded.sha256, loaded.all_zero)
        pieces: list[Piece] = []
        fidelity: dict[str, Fidelity] = {}
        for made in encode_job(job, loaded, self._geometry, shards):
            pieces += [self._outputs.write(*written) for written in made.written]
            if made.fidelity:
                fidelity[made.weight.weight.name] = made.fidelity
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
        while filled < room.size and (read := file.readinto(room[filled:].data)):
            filled += read
    if filled < room.size:
        raise IntegrityError(
            f"{info.shard}: tensor {info.name}: {room.size:,} bytes were expected, {filled:,} "
            "could be read. The file changed while it was used; fetch it again."
        )
    return room
