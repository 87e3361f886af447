"""Tensors that were made before are copied, not made again.

A weight's key is the hash of all that decides its stored bytes: where its source bytes lie in which
files, how they are restructured, its scheme, the encoder's version. Finished shards of other plans,
in this workspace or in others that the caller names, give each tensor whose key is the same; the
copy is held against the digest that was recorded when it was made.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glm_quant.artifact import publish_file
from glm_quant.checkpoint.header import header_length, parse_header
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.errors import HeaderError
from glm_quant.litter import entries
from glm_quant.quantize.layout import PlannedTensor, PlannedWeight
from glm_quant.quantize.outputs import Outputs
from glm_quant.quantize.records import ShardRecord
from glm_quant.workspace import Workspace

_BLOCK_BYTES = 16 << 20


@dataclass(frozen=True)
class ReusableTensor:
    """A finished tensor: its file and place there, that file's record, and where it is to go."""

    path: Path
    begin: int
    record: ShardRecord
    target: PlannedTensor

    @property
    def sha256(self) -> str:
        """Of the tensor's bytes, as recorded."""
        return self.record.tensors[self.target.name]


# By the name of a weight, then by that of each of its tensors.
Reusables = Mapping[str, Mapping[str, ReusableTensor]]

# By a weight's key and the name of a tensor: file, first byte there, the file's record.
_Index = dict[tuple[str, str], tuple[Path, int, ShardRecord]]


class ReuseStore:
    """Finished shards of other plans: moved aside in this workspace, or in other workspaces."""

    def __init__(self, workspace: Workspace, also_in: Sequence[Workspace]) -> None:
        """Remember where to look; nothing is read yet."""
        self._workspace = workspace
        self._also_in = also_in

    def reusable(self, outputs: Outputs, unfinished: list[int]) -> Reusables:
        """Return, for each weight of unfinished outputs that was made before, its tensors.

        Finished shards of an earlier plan that are of use are moved aside first, so that nothing
        new is written over them; one that has only another name now is given that.
        """
        weights = {p.weight.name: p for shard in unfinished for p in outputs.weights_of[shard]}
        # The keys of a whole plan take a second: not where there is nothing to find.
        wanted = {outputs.keys[name] for name in weights} if self._has_records() else set[str]()
        if not wanted:
            return {}
        self._move_aside(outputs, set(unfinished), wanted)
        self._rename_back(outputs, unfinished)
        index: _Index = {}
        for path, record in self._moved_aside():
            _add_tensors(index, path, record)
        for workspace in self._also_in:
            for path, record in finished_shards(workspace):
                _add_tensors(index, path, record)
        tensors = {name: _find(index, p, outputs.keys[name]) for name, p in weights.items()}
        return {name: by_name for name, by_name in tensors.items() if by_name}

    def keys(self) -> set[str]:
        """Return the keys of all weights that finished outputs have, wherever these stand."""
        keys: set[str] = set()
        for workspace in (self._workspace, *self._also_in):
            for folder in (workspace.shard_records, workspace.previous):
                for path in entries(folder, "*.json"):
                    record = ShardRecord.load(path)
                    keys |= set(record.keys.values()) if record else set()
        return keys

    def _has_records(self) -> bool:
        places = (self._workspace.shard_records, self._workspace.previous)
        return bool(self._also_in) or any(entries(place, "*.json") for place in places)

    def _move_aside(self, outputs: Outputs, unfinished: set[int], wanted: set[str]) -> None:
        keep = {shard.name for i, shard in enumerate(outputs.plan.shards) if i not in unfinished}
        for path, record in finished_shards(self._workspace):
            if path.name not in keep and not wanted.isdisjoint(record.keys.values()):
                # A manifest says that the output is whole.
                (self._workspace.checkpoint / MANIFEST_NAME).unlink(missing_ok=True)
                aside = self._workspace.previous / f"{record.fingerprint[:16]}.safetensors"
                # Record, file, old record: a crash in between loses neither of the two.
                record.save(aside.with_suffix(".json"))
                publish_file(path, aside)
                (self._workspace.shard_records / f"{path.name}.json").unlink(missing_ok=True)

    def _moved_aside(self) -> list[tuple[Path, ShardRecord]]:
        shards: list[tuple[Path, ShardRecord]] = []
        for path in entries(self._workspace.previous, "*.safetensors"):
            record = ShardRecord.load(path.with_suffix(".json"))
            if record and path.stat().st_size == record.outputs[0].size_bytes:
                shards.append((path, record))
        return shards

    def _rename_back(self, outputs: Outputs, unfinished: list[int]) -> None:
        """Give a shard that is wanted as it is, but under another name, that name."""
        aside = {record.fingerprint: (path, record) for path, record in self._moved_aside()}
        for shard in unfinished:
            path, record = aside.get(outputs.fingerprint(shard), (None, None))
            if path and record:
                name = outputs.plan.shards[shard].name
                publish_file(path, self._workspace.checkpoint / name)
                digest = record.outputs[0].model_copy(update={"path": name})
                renamed = record.model_copy(update={"outputs": [digest]})
                renamed.save(outputs.record_path(shard))


def _add_tensors(index: _Index, path: Path, record: ShardRecord) -> None:
    """Add the tensors of a finished shard; a file that is no such shard adds nothing."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(file.read(8), path.name, size)
            tensors = parse_header(file.read(length), path.name, size)
    # A file that is being made or was damaged is of no use, and no reason to stop.
    except (OSError, HeaderError):
        return
    for weight, key in record.keys.items():
        stem = weight.rpartition(".")[0]
        for name in (weight, f"{stem}.scales", f"{stem}.biases"):
            if name in tensors and name in record.tensors:
                # The first one stays: this workspace's own come before those of others.
                index.setdefault((key, name), (path, tensors[name].begin, record))


def _find(index: _Index, planned: PlannedWeight, key: str) -> dict[str, ReusableTensor] | None:
    """Return each tensor of a weight by name, or None where one is missing."""
    tensors: dict[str, ReusableTensor] = {}
    for target in planned.tensors:
        place = index.get((key, target.name))
        if place is None:
            return None
        tensors[target.name] = ReusableTensor(*place, target)
    return tensors


def finished_shards(workspace: Workspace) -> Iterator[tuple[Path, ShardRecord]]:
    """Yield the finished output shards of a workspace, whatever plan they are of."""
    for entry in entries(workspace.shard_records, "*.json"):
        record = ShardRecord.load(entry)
        if record and record.outputs and record.is_whole(workspace.checkpoint):
            yield workspace.checkpoint / record.outputs[0].path, record


def read_reusable(tensor: ReusableTensor) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Yield (first row, bytes of rows) of a reusable tensor."""
    target = tensor.target
    step = max(1, _BLOCK_BYTES // target.row_bytes) * target.row_bytes
    with tensor.path.open("rb") as file:
        for offset in range(0, target.size_bytes, step):
            size = min(step, target.size_bytes - offset)
            data = os.pread(file.fileno(), size, tensor.begin + offset)
            yield offset // target.row_bytes, np.frombuffer(data, np.uint8)
