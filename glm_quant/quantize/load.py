"""What a job reads of the source, looked at value by value, and the rows that are made of it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.architectures.architecture import STORED_DTYPE
from glm_quant.architectures.replay import Replay, SourceRange
from glm_quant.architectures.segments import Segment
from glm_quant.checkpoint.header import ITEM_SIZE, TensorInfo
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.encode import Rows, cpu_stream, require_finite

# (tensor, first byte in its data, number of bytes) to those bytes.
Read = Callable[[TensorInfo, int, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class LoadedJob:
    """The bytes that a job reads.

    Attributes:
        data: of each range of the source.
        tensors: the headers.
        sha256: of all bytes, in the order in which they are read.
        all_zero: whether those of the main tensors are all zero.
        where: what messages call them: "shard: tensor name".
    """

    data: dict[SourceRange, NDArray[np.uint8]]
    tensors: dict[str, TensorInfo]
    sha256: str
    all_zero: bool
    where: str

    def rows(self, segment: Segment, begin: int, end: int) -> Rows:
        """Return units `begin` to `end` of a segment, every value looked at.

        Raises:
            WeightError: a value is NaN or Inf.
        """
        if segment.is_copy:
            [stored] = _ranges(segment, begin, end)
            info = self.tensors[segment.source]
            return Rows(_bits(self.data[stored], info.dtype).reshape(-1, _width(info)), info.dtype)
        with mx.stream(cpu_stream()):
            array = segment.replay(Replay(self._read), begin, end)
            mx.eval(array)
            bits = np.array(array.view(_UNSIGNED[array.itemsize]))
        rows = Rows(bits, STORED_DTYPE[array.dtype])
        require_finite(rows, self.where)
        return rows

    def _read(self, name: str, begin: int, end: int) -> mx.array:
        bits = _bits(self.data[SourceRange(name, begin, end)], self.tensors[name].dtype)
        return mx.array(bits).view(_MLX_DTYPE[self.tensors[name].dtype])


# FP8 codes are bytes to MLX.
_MLX_DTYPE = {
    **{name: dtype for dtype, name in STORED_DTYPE.items()},
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0"), mx.uint8),
    "BOOL": mx.bool_,
    "I8": mx.int8,
    "I16": mx.int16,
    "U16": mx.uint16,
    "U64": mx.uint64,
}
_UNSIGNED = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}


def read_of(checkpoint: Checkpoint) -> Read:
    """Return what reads a checkpoint's tensors at its source."""

    def read(info: TensorInfo, begin: int, size: int) -> NDArray[np.uint8]:
        first = info.begin + begin
        return np.frombuffer(checkpoint.source.read(info.shard, first, first + size), np.uint8)

    return read


def load_parts(
    parts: Sequence[tuple[Segment, int, int]], where: str, checkpoint: Checkpoint, read: Read
) -> LoadedJob:
    """Read what some parts of segments are made of, and look at every value.

    Args:
        parts: segments with first and end unit.
        where: what messages call them.
        checkpoint: knows where the tensors lie.
        read: returns bytes of a tensor.

    Raises:
        WeightError: a value is NaN or Inf.
    """
    digest = hashlib.sha256()
    data: dict[SourceRange, NDArray[np.uint8]] = {}
    tensors: dict[str, TensorInfo] = {}
    for segment, begin, end in parts:
        for piece in _ranges(segment, begin, end):
            if piece in data:
                continue
            info = tensors[piece.name] = checkpoint.tensors[piece.name]
            item = ITEM_SIZE[info.dtype]
            stored = read(info, piece.begin * item, (piece.end - piece.begin) * item)
            digest.update(stored.data)
            width = info.shape[-1] if info.shape else 1
            bits = _bits(stored, info.dtype)
            require_finite(
                Rows(
                    bits.reshape(-1, width) if bits.size % width == 0 else bits.reshape(1, -1),
                    info.dtype,
                ),
                f"{info.shard}: tensor {piece.name}",
            )
            data[piece] = stored
    # The scales of an FP8 weight of zeros need not be zero.
    main = {segment.source for segment, _, _ in parts}
    zero = not any(stored.any() for piece, stored in data.items() if piece.name in main)
    return LoadedJob(data, tensors, digest.hexdigest(), zero, where)


def _ranges(segment: Segment, begin: int, end: int) -> list[SourceRange]:
    if segment.is_copy:
        width = segment.source_elements // segment.source_rows
        return [SourceRange(segment.source, begin * width, end * width)]
    with mx.stream(cpu_stream()):
        return segment.reads(begin, end)


def _width(info: TensorInfo) -> int:
    return info.shape[-1] if info.shape else 1


def _bits(data: NDArray[np.uint8], dtype: str) -> NDArray[np.unsignedinteger]:
    return data.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[ITEM_SIZE[dtype]])
