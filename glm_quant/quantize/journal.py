"""The journal of a conversion: which jobs' bytes are durable in the partial outputs.

One JSON line a job, appended only after the bytes it speaks of were fsynced. A torn last line, the
trace of a crash, is cut off, and so is all that follows a damaged one; a journal of another plan is
not used. Each piece carries a CRC-32 so that a byte that changes between writing and finishing is
noticed, and so does each line.
"""

import json
import zlib
from collections.abc import Collection
from dataclasses import astuple, dataclass, field
from pathlib import Path
from typing import Any, cast

from glm_quant.artifact import sync_file, write_atomic
from glm_quant.codes.fidelity import Fidelity


@dataclass(frozen=True, slots=True)
class Piece:
    """Bytes that a job wrote: tensor, place in its shard, length, CRC-32."""

    tensor: str
    shard: int
    offset: int
    size_bytes: int
    crc32: int


@dataclass(frozen=True, slots=True)
class Entry:
    """A finished job.

    Attributes:
        job: its key.
        source_sha256: of the source bytes it read.
        pieces: what it wrote.
        fidelity: how near the codes are to each weight that it quantized, by module path.
    """

    job: str
    source_sha256: str
    pieces: tuple[Piece, ...]
    fidelity: dict[str, Fidelity] = field(default_factory=dict[str, Fidelity])


class Journal:
    """An append-only file; `entries` holds what it says."""

    def __init__(self, path: Path, plan_fingerprint: str) -> None:
        """Open or begin the journal of one plan."""
        self._path = path
        self._head = json.dumps({"plan": plan_fingerprint}) + "\n"
        self.entries: dict[str, Entry] = {}
        good = self._read()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("r+b" if good else "w+b")
        # A line appended to a torn one would be lost with it.
        self._file.truncate(good)
        self._file.seek(good)
        if not good:
            self._write(self._head)

    @property
    def is_new(self) -> bool:
        """Whether nothing was journaled for this plan yet."""
        return not self.entries

    def append(self, entries: list[Entry]) -> None:
        """Add finished jobs; their bytes must be durable already."""
        self._write("".join(map(_line, entries)))
        self.entries |= {entry.job: entry for entry in entries}

    def forget(self, jobs: Collection[str]) -> None:
        """Drop jobs whose bytes are gone."""
        # Only where something is dropped: the file has hundreds of thousands of lines.
        keep = [entry for entry in self.entries.values() if entry.job not in jobs]
        if len(keep) < len(self.entries):
            write_atomic(self._path, (self._head + "".join(map(_line, keep))).encode())
            self._file.close()
            self._file = self._path.open("ab")
            self.entries = {entry.job: entry for entry in keep}

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, text: str) -> None:
        self._file.write(text.encode())
        self._file.flush()
        sync_file(self._file.fileno())

    def _read(self) -> int:
        """Read the entries; return how many bytes of the file are good."""
        if not self._path.exists() or not self._path.stat().st_size:
            return 0
        good = 0
        with self._path.open("rb") as file:
            if file.readline().decode(errors="replace") != self._head:
                return 0
            good = file.tell()
            for line in file:
                entry = _parse(line)
                if entry is None:
                    # What follows a damaged line was appended after it and may rest on it.
                    break
                self.entries[entry.job] = entry
                good += len(line)
        return good


def _line(entry: Entry) -> str:
    pieces = [list(astuple(piece)) for piece in entry.pieces]
    fidelity = {path: list(astuple(sums)) for path, sums in entry.fidelity.items()}
    values = [entry.job, entry.source_sha256, pieces, fidelity]
    return json.dumps([*values, _seal(values)]) + "\n"


def _seal(values: list[Any]) -> int:
    """Return what tells a flipped bit that leaves good JSON, as in a digest."""
    return zlib.crc32(json.dumps(values).encode())


def _parse(line: bytes) -> Entry | None:
    if not line.endswith(b"\n"):
        return None  # torn, even if by chance it is whole JSON: the next line would join it
    try:
        *values, seal = cast("list[Any]", json.loads(line))
        if seal != _seal(values):
            return None
        job, sha256, pieces, fidelity = values
        return Entry(
            job,
            sha256,
            tuple(Piece(*piece) for piece in pieces),
            {path: Fidelity.of(*sums) for path, sums in fidelity.items()},
        )
    except (ValueError, TypeError, AttributeError):
        return None
