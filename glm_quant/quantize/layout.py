"""The layout of a plan: each output tensor's shard and byte offset.

Weights are packed in the order of the plan, which is that of their sources.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from glm_quant.architectures.weights import OutputWeight
from glm_quant.checkpoint.header import ITEM_SIZE
from glm_quant.checkpoint.imatrix import Factor, Importance
from glm_quant.codes.scheme import Scheme, TensorLayout, layouts


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output shard; `offset` is absolute in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    row_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class PlannedWeight:
    """An output weight with its scheme and the tensors it is stored as."""

    weight: OutputWeight
    scheme: Scheme
    tensors: tuple[PlannedTensor, ...]
    importance: Importance | None = None
    factor: Factor | None = None

    def describe(self) -> str:
        """Return everything but the source that decides its bytes."""
        return self.scheme.describe() + self.calibrated

    @property
    def calibrated(self) -> str:
        """What of a calibration decides its bytes."""
        importance = f", imatrix {self.importance.sha256}" if self.importance else ""
        return importance + (f", factor {self.factor.sha256}" if self.factor else "")

    @property
    def size_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class PlannedShard:
    """One output file: its name, its header and what it holds."""

    name: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)


def lay_out(
    kept: Sequence[tuple[OutputWeight, Scheme]], shard_bytes: int
) -> tuple[tuple[PlannedWeight, ...], tuple[PlannedShard, ...]]:
    """Pack tensors greedily into shards and fix every byte offset."""
    stored = [(layout, name) for weight, scheme in kept for layout, name in _stored(weight, scheme)]
    packs = _pack(stored, shard_bytes)
    shards = tuple(
        _shard(
            f"model-{i + 1:05d}-of-{len(packs):05d}.safetensors"
            if len(packs) > 1
            else "model.safetensors",
            i,
            pack,
        )
        for i, pack in enumerate(packs)
    )
    # By name: the tensors of one weight may lie in two shards.
    placed = {tensor.name: tensor for shard in shards for tensor in shard.tensors}
    planned = tuple(
        PlannedWeight(weight, scheme, tuple(placed[name] for _, name in _stored(weight, scheme)))
        for weight, scheme in kept
    )
    return planned, shards


def _stored(weight: OutputWeight, scheme: Scheme) -> list[tuple[TensorLayout, str]]:
    """Return the tensors that a weight is stored as, with their names."""
    return [
        (layout, tensor_name(weight, layout))
        for layout in layouts(scheme, weight.shape, weight.source_dtype)
    ]


def _pack(
    stored: Sequence[tuple[TensorLayout, str]], shard_bytes: int
) -> list[list[tuple[TensorLayout, str]]]:
    packs: list[list[tuple[TensorLayout, str]]] = []
    filled = 0
    for layout, name in stored:
        # A tensor is never divided: one that is larger than a shard has one of its own.
        if not packs or filled + layout.size_bytes > shard_bytes:
            packs.append([])
            filled = 0
        packs[-1].append((layout, name))
        filled += layout.size_bytes
    return packs


def _shard(name: str, number: int, entries: list[tuple[TensorLayout, str]]) -> PlannedShard:
    """Fix the header and the offsets of one file.

    Wide dtypes come first and names are sorted, as safetensors' own writer does, so that every
    tensor is aligned to its item size.
    """
    ordered = sorted(entries, key=lambda entry: (-ITEM_SIZE[entry[0].dtype], entry[1]))
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    begin = 0
    for layout, tensor in ordered:
        end = begin + layout.size_bytes
        header[tensor] = {
            "dtype": layout.dtype,
            "shape": list(layout.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    # safetensors pads the header so that data begins at a multiple of 8.
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    tensors: list[PlannedTensor] = []
    offset = len(head)
    for layout, tensor in ordered:
        tensors.append(
            PlannedTensor(
                tensor,
                layout.dtype,
                layout.shape,
                number,
                offset,
                layout.row_bytes,
                layout.size_bytes,
            )
        )
        offset += layout.size_bytes
    return PlannedShard(name, head, tuple(tensors))


def tensor_name(weight: OutputWeight, layout: TensorLayout) -> str:
    """Return the name under which one stored tensor of a weight stands in its shard."""
    return f"{weight.path}.{layout.suffix}" if layout.suffix else weight.name
