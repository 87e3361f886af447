"""Output shards while they are being filled: sparse files of final size, and their journal.

Bytes may arrive in any order and from several threads. They count only once journaled, and the
journal is written only after they are durable. A shard is read once more before it gets its final
name, as far as it is there already while it fills: every piece must be there, and be what was
written. Writing, flushing and reading again may go on at the same time, in threads of their own.
"""

import hashlib
import os
import threading
import zlib
from collections import defaultdict
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glm_quant.artifact import FileDigest, publish_file, sync_file
from glm_quant.errors import IntegrityError
from glm_quant.litter import entries
from glm_quant.quantize.journal import Entry, Journal, Piece
from glm_quant.quantize.layout import PlannedShard, PlannedTensor

# Of an output that is read again, at a time.
_READ_BYTES = 4 << 20


class _Reading:
    """How far a shard was read again: the file's digest so far, and that of each tensor."""

    def __init__(self) -> None:
        self.begun = False
        self.whole = hashlib.sha256()
        self.tensors: dict[str, str] = {}


class PartialOutputs:
    """The unfinished outputs of one plan in one folder."""

    def __init__(
        self, folder: Path, shards: tuple[PlannedShard, ...], plan_fingerprint: str
    ) -> None:
        """Open the folder; what belongs to another plan is discarded."""
        self._folder = folder
        self._shards = shards
        folder.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(folder / "journal.jsonl", plan_fingerprint)
        self._files: dict[int, int] = {}
        self._waiting: list[Entry] = []
        self._lock = threading.Lock()  # of what the journal says and what waits for it
        self._pieces: dict[int, dict[str, list[Piece]]] = defaultdict(lambda: defaultdict(list))
        self._readings: dict[int, _Reading] = defaultdict(_Reading)
        for entry in self.done.values():
            self._index_pieces(entry)
        self.unflushed_bytes = 0
        if self._journal.is_new:
            # Of another plan, or never journaled: their bytes mean nothing.
            for path in entries(folder, "*.part"):
                path.unlink()

    @property
    def largest_bytes(self) -> int:
        """Size of the largest output."""
        return max(shard.size_bytes for shard in self._shards)

    @property
    def done(self) -> dict[str, Entry]:
        """Jobs whose bytes are durable, by key."""
        return self._journal.entries

    def take_back(self, shard: int, folder: Path) -> None:
        """Undo a shard's publishing if a crash came before its record.

        All its bytes are journaled, so they can be checked and recorded instead of made again.
        """
        planned = self._shards[shard]
        path = folder / planned.name
        # Only if the journal vouches for every byte; otherwise the shard is made again.
        pieces = (piece for of_tensor in self._pieces[shard].values() for piece in of_tensor)
        whole = sum(tensor.size_bytes for tensor in planned.tensors)
        journaled = sum(piece.size_bytes for piece in pieces) == whole
        if journaled and path.is_file() and not self._path(shard).exists():
            publish_file(path, self._path(shard))

    def is_intact(self, shard: int) -> bool:
        """Whether the partial file of a shard exists at its full size."""
        path = self._path(shard)
        return path.exists() and path.stat().st_size == self._shards[shard].size_bytes

    def forget(self, shard: int, jobs: Collection[str]) -> None:
        """Drop a shard's partial file and the jobs that write to it, or once did."""
        if shard in self._files:
            os.close(self._files.pop(shard))
        self._path(shard).unlink(missing_ok=True)
        # Its digests were of bytes that are gone.
        self._readings.pop(shard, None)
        # A job that wrote to several shards counts whole or not at all.
        wrote = {key for key, e in self.done.items() if any(p.shard == shard for p in e.pieces)}
        self._drop(wrote.union(jobs))

    def keep_only(self, shards: Collection[int], jobs: Collection[str]) -> None:
        """Of the jobs that wrote to these shards, drop those that are not among `jobs`."""
        self._drop(
            {
                key
                for key, entry in self.done.items()
                if key not in jobs and any(piece.shard in shards for piece in entry.pieces)
            }
        )

    def make_way(self, tensors: Collection[str], jobs: Collection[str]) -> None:
        """Drop jobs that wrote to these tensors and are not among `jobs`: others will."""
        self._drop(
            {
                key
                for key, entry in self.done.items()
                if key not in jobs and any(piece.tensor in tensors for piece in entry.pieces)
            }
        )

    def _drop(self, jobs: Collection[str]) -> None:
        with self._lock:
            self._journal.forget(jobs)
            # Anew from the journal: pieces do not say which job wrote them.
            self._pieces.clear()
            for entry in self.done.values():
                self._index_pieces(entry)

    def open(self, shard: int) -> None:
        """Make a shard writable, creating it at full size with its header.

        The header is written every time: a crash may have come between the two.
        """
        if shard in self._files:
            return
        planned, path = self._shards[shard], self._path(shard)
        # Sparse: rows may arrive in any order, and the disk holds only what was written.
        file = self._files[shard] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        os.ftruncate(file, planned.size_bytes)
        _write_all(file, memoryview(planned.header), 0)

    def write(self, tensor: PlannedTensor, first_row: int, data: NDArray[np.uint8]) -> Piece:
        """Write whole rows of a tensor. Safe from several threads: no two jobs share a byte."""
        offset = tensor.offset + first_row * tensor.row_bytes
        _write_all(self._files[tensor.shard], data.data, offset)
        return Piece(tensor.name, tensor.shard, offset, data.size, zlib.crc32(data.data))

    def finish_job(self, entry: Entry) -> None:
        """Add a job whose bytes are written; `flush` makes it count."""
        with self._lock:
            self._waiting.append(entry)
            self.unflushed_bytes += sum(piece.size_bytes for piece in entry.pieces)

    def flush(self) -> list[Entry]:
        """Make written bytes durable, then say so in the journal.

        Returns:
            The jobs that count from now on.
        """
        with self._lock:
            # What is written from here on belongs to the next flush; encoders go on meanwhile.
            batch, self._waiting = self._waiting, []
            self.unflushed_bytes = 0
        # First the bytes, then the journal: an entry is a promise that they are there.
        for shard in sorted({piece.shard for entry in batch for piece in entry.pieces}):
            sync_file(self._files[shard])
        if batch:
            with self._lock:
                self._journal.append(batch)
                for entry in batch:
                    self._index_pieces(entry)
        return batch

    def check_ahead(self, shard: int) -> None:
        """Read the tensors that are complete by now and come next in the file.

        Raises:
            IntegrityError: a byte is not what was written.
        """
        planned, reading = self._shards[shard], self._readings[shard]
        if not reading.begun:
            reading.begun = True
            self.open(shard)
            header = os.pread(self._files[shard], len(planned.header), 0)
            if header != planned.header:
                raise IntegrityError(f"{planned.name}: the header changed after it was written.")
            reading.whole.update(header)
        # The file's own digest has a thread to itself: hashing is what this pass costs.
        with ThreadPoolExecutor(1) as pool:
            for tensor in planned.tensors[len(reading.tensors) :]:
                with self._lock:
                    pieces = list(self._pieces[shard][tensor.name])
                # In the order of the file alone, since its digest can be taken in no other.
                if sum(piece.size_bytes for piece in pieces) < tensor.size_bytes:
                    return
                digest = hashlib.sha256()
                for data in self._read_pieces(planned.name, tensor, pieces):
                    beside = pool.submit(reading.whole.update, data)
                    digest.update(data)
                    beside.result()
                reading.tensors[tensor.name] = digest.hexdigest()

    def check(self, shard: int) -> tuple[FileDigest, dict[str, str]]:
        """Read the rest of a filled shard.

        Returns:
            The file's digest, and the sha256 of each tensor by name.

        Raises:
            IntegrityError: a byte is missing or is not what was written.
        """
        self.check_ahead(shard)
        planned, reading = self._shards[shard], self._readings[shard]
        for tensor in planned.tensors[len(reading.tensors) :]:
            filled = sum(piece.size_bytes for piece in self._pieces[shard][tensor.name])
            raise IntegrityError(
                f"{planned.name}: tensor {tensor.name} has {filled:,} of {tensor.size_bytes:,} "
                "bytes."
            )
        digest = FileDigest(
            path=planned.name, size_bytes=planned.size_bytes, sha256=reading.whole.hexdigest()
        )
        return digest, reading.tensors

    def publish(self, shard: int, folder: Path) -> None:
        """Give a checked shard its final name, durably."""
        folder.mkdir(parents=True, exist_ok=True)
        file = self._files.pop(shard)
        # `open` wrote the header again, and no flush of a job came after that.
        sync_file(file)
        os.close(file)
        publish_file(self._path(shard), folder / self._shards[shard].name)

    def rest(self) -> None:
        """Make durable what was written, and close the shards: `open` opens them again."""
        try:
            self.flush()
        finally:
            for file in self._files.values():
                os.close(file)
            self._files.clear()

    def close(self) -> None:
        """Make durable what was written, and close every file."""
        try:
            self.rest()
        finally:
            self._journal.close()

    def _path(self, shard: int) -> Path:
        return self._folder / f"{self._shards[shard].name}.part"

    def _index_pieces(self, entry: Entry) -> None:
        for piece in entry.pieces:
            self._pieces[piece.shard][piece.tensor].append(piece)

    def _read_pieces(
        self, shard: str, tensor: PlannedTensor, pieces: list[Piece]
    ) -> Iterator[bytes]:
        expected = tensor.offset
        for piece in sorted(pieces, key=lambda p: p.offset):
            checksum, end = 0, piece.offset + piece.size_bytes
            for begin in range(piece.offset, end, _READ_BYTES):
                size = min(_READ_BYTES, end - begin)
                data = os.pread(self._files[tensor.shard], size, begin)
                checksum = zlib.crc32(data, checksum)
                yield data
            if piece.offset != expected or checksum != piece.crc32:
                raise IntegrityError(
                    f"{shard}: tensor {tensor.name} changed on disk after it was written: CRC-32 "
                    f"{checksum:08x} at byte {piece.offset:,}, {piece.crc32:08x} was journaled."
                )
            expected += piece.size_bytes


def _write_all(file: int, data: memoryview, offset: int) -> None:
    """Write all of `data`: pwrite may write less than it is given."""
    view = data.cast("B")
    while view:
        written = os.pwrite(file, view, offset)
        view, offset = view[written:], offset + written
