"""Tensors that were made before are copied, not made again.

A weight's key is the hash of all that decides its stored bytes: where its source bytes lie in which
files, how they are restructured, its scheme, the encoder's version. Finished shards of other plans,
in this workspace or in others that the caller names, give each tensor whose key is the same; the
copy is held against the digest that was recorded when it was made.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glm_quant.artifact import publish_file
from glm_quant.checkpoint.header import header_length, parse_header
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.errors import HeaderError
from glm_quant.quantize.ledger import Ledger
from glm_quant.quantize.plan import PlannedTensor, PlannedWeight
from glm_quant.quantize.records import ShardRecord
from glm_quant.workspace import Workspace

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class Donor:
    """A finished tensor: its file and place there, that file's record, and where it is to go."""

    path: Path
    begin: int
    record: ShardRecord
    target: PlannedTensor

    @property
    def sha256(self) -> str:
        """Of the tensor's bytes, as recorded."""
        return self.record.tensors[self.target.name]


class Donors:
    """Finished tensors by key and name."""

    def __init__(self) -> None:
        """Begin with none."""
        self._found: dict[tuple[str, str], tuple[Path, int, ShardRecord]] = {}

    def add(self, path: Path, record: ShardRecord) -> None:
        """Add the tensors of a finished shard; a file that is no such shard adds nothing."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                length = header_length(file.read(8), path.name, size)
                tensors = parse_header(file.read(length), path.name, size)
        except (OSError, HeaderError):
            return
        for weight, key in record.keys.items():
            stem = weight.rpartition(".")[0]
            for name in (weight, f"{stem}.scales", f"{stem}.biases"):
                if name in tensors and name in record.tensors:
                    self._found.setdefault((key, name), (path, tensors[name].begin, record))

    def find(self, planned: PlannedWeight, key: str) -> dict[str, Donor] | None:
        """Return a donor for each tensor of a weight, by name, or None where one is missing."""
        found: dict[str, Donor] = {}
        for tensor in planned.tensors:
            entry = self._found.get((key, tensor.name))
            if entry is None:
                return None
            found[tensor.name] = Donor(*entry, tensor)
        return found


class Shelf:
    """Where finished shards of other plans stand: moved aside in this workspace, or in others."""

    def __init__(self, workspace: Workspace, others: Sequence[Workspace]) -> None:
        """Remember where to look; nothing is read yet."""
        self._workspace = workspace
        self._others = others

    def donors(self, ledger: Ledger, unfinished: list[int]) -> dict[str, dict[str, Donor]]:
        """Return, for each weight of unfinished outputs that was made before, its tensors.

        Finished shards of an earlier plan that are of use are moved aside first, so that nothing
        new is written over them; one that has only another name now is given that.
        """
        weights = {p.weight.name: p for shard in unfinished for p in ledger.weights_of[shard]}
        wanted = {ledger.keys[name] for name in weights} if self._anything() else set[str]()
        if not wanted:
            return {}
        self._move_aside(ledger, set(unfinished), wanted)
        self._rename_back(ledger, unfinished)
        donors = Donors()
        for path, record in self._aside():
            donors.add(path, record)
        for other in self._others:
            for path, record in finished_shards(other):
                donors.add(path, record)
        found = {name: donors.find(p, ledger.keys[name]) for name, p in weights.items()}
        return {name: tensors for name, tensors in found.items() if tensors}

    def keys(self) -> set[str]:
        """Return the keys of all weights that finished outputs have, wherever these stand."""
        found: set[str] = set()
        for place in (self._workspace, *self._others):
            for folder in (place.shard_records, place.previous):
                for path in folder.glob("*.json"):
                    record = ShardRecord.load(path)
                    found |= set(record.keys.values()) if record else set()
        return found

    def _anything(self) -> bool:
        """Whether there may be any donor: the keys of a whole plan take a second."""
        places = (self._workspace.shard_records, self._workspace.previous)
        return bool(self._others) or any(any(place.glob("*.json")) for place in places)

    def _move_aside(self, ledger: Ledger, unfinished: set[int], wanted: set[str]) -> None:
        keep = {shard.name for i, shard in enumerate(ledger.plan.shards) if i not in unfinished}
        for path, record in finished_shards(self._workspace):
            if path.name not in keep and not wanted.isdisjoint(record.keys.values()):
                # A manifest says that the output is whole.
                (self._workspace.checkpoint / MANIFEST_NAME).unlink(missing_ok=True)
                aside = self._workspace.previous / f"{record.fingerprint[:16]}.safetensors"
                record.save(aside.with_suffix(".json"))
                publish_file(path, aside)
                (self._workspace.shard_records / f"{path.name}.json").unlink(missing_ok=True)

    def _aside(self) -> list[tuple[Path, ShardRecord]]:
        found: list[tuple[Path, ShardRecord]] = []
        for path in sorted(self._workspace.previous.glob("*.safetensors")):
            record = ShardRecord.load(path.with_suffix(".json"))
            if record and path.stat().st_size == record.outputs[0].size_bytes:
                found.append((path, record))
        return found

    def _rename_back(self, ledger: Ledger, unfinished: list[int]) -> None:
        """Give a shard that is wanted as it is, but under another name, that name."""
        aside = {record.fingerprint: (path, record) for path, record in self._aside()}
        for shard in unfinished:
            path, record = aside.get(ledger.fingerprint(shard), (None, None))
            if path and record:
                name = ledger.plan.shards[shard].name
                publish_file(path, self._workspace.checkpoint / name)
                digest = record.outputs[0].model_copy(update={"path": name})
                record.model_copy(update={"outputs": [digest]}).save(ledger.record_path(shard))


def finished_shards(workspace: Workspace) -> Iterator[tuple[Path, ShardRecord]]:
    """Yield the finished output shards of a workspace, whatever plan they are of."""
    for entry in sorted(workspace.shard_records.glob("*.json")):
        record = ShardRecord.load(entry)
        if record and record.outputs and record.is_whole(workspace.checkpoint):
            yield workspace.checkpoint / record.outputs[0].path, record


def copied(donor: Donor) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (first row, bytes of rows) of a donated tensor."""
    target = donor.target
    step = max(1, _BLOCK_BYTES // target.row_bytes) * target.row_bytes
    with donor.path.open("rb") as file:
        for offset in range(0, target.size_bytes, step):
            size = min(step, target.size_bytes - offset)
            data = os.pread(file.fileno(), size, donor.begin + offset)
            yield offset // target.row_bytes, np.frombuffer(data, np.uint8)
