"""Safetensors headers, read as hostile input.

A file is `u64 length | JSON | data`. Everything in the JSON is a claim to check against the file:
names, dtypes, shapes and byte ranges. The format is the one of safetensors 0.7 (`SafeTensors::
validate`): ranges in order, without holes or overlap, ending exactly where the file ends.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, cast

from glm_quant.errors import HeaderError

# The largest header of the GLM-5.2 release is below 200 KB; safetensors itself allows 100 MB, which
# as Python objects would cost about a gigabyte.
MAX_HEADER_BYTES = 16 << 20
# An index of GLM-5.2 has 60,000 values. As a Python object a value costs up to some 300 bytes,
# however short its text is, so the size of the text alone bounds nothing.
MAX_JSON_VALUES = 500_000
_MAX_DIMS = 8
_MAX_NAME = 200
_MAX_ELEMENTS = 1 << 48

ITEM_SIZE = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `begin` and `end` are absolute byte offsets in its shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    begin: int
    end: int

    @property
    def size_bytes(self) -> int:
        """Bytes of the tensor's data."""
        return self.end - self.begin

    def rows(self, first: int, count: int) -> "TensorInfo":
        """Return where rows `first` to `first + count` along the first axis lie."""
        row = self.size_bytes // self.shape[0]
        begin = self.begin + first * row
        shape = (count, *self.shape[1:])
        return replace(self, shape=shape, begin=begin, end=begin + count * row)


def header_length(first_bytes: bytes, shard: str, file_size: int) -> int:
    """Return the length of the JSON from a shard's first eight bytes.

    Raises:
        HeaderError: the file is too short, or the claimed length does not fit it.
    """
    if len(first_bytes) < 8:
        raise HeaderError(
            f"{shard}: a safetensors file begins with 8 bytes of header length, the file has "
            f"{file_size}. The download stopped early; fetch the file again."
        )
    length = int.from_bytes(first_bytes[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise HeaderError(
            f"{shard}: the header claims {length:,} bytes, more than the {MAX_HEADER_BYTES:,} that "
            "are accepted. This is no weight shard; fetch the file again."
        )
    if 8 + length > file_size:
        raise HeaderError(
            f"{shard}: the header claims {length:,} bytes, the file has {file_size:,} in all. "
            "The download stopped early; fetch the file again."
        )
    return length


def parse_header(text: bytes, shard: str, file_size: int) -> dict[str, TensorInfo]:
    """Check a header's JSON against the file and return its tensors by name.

    Args:
        text: the JSON, without the eight length bytes.
        shard: the file's name, for messages and for `TensorInfo.shard`.
        file_size: size of the whole file in bytes.

    Raises:
        HeaderError: the JSON is malformed, or a claim contradicts the file.
    """
    tensors: dict[str, TensorInfo] = {}
    data_begin = 8 + len(text)
    for name, entry in _json_object(text, shard).items():
        if name != "__metadata__":
            tensors[name] = _tensor(name, entry, shard, data_begin, file_size)
    expected = data_begin
    for tensor in sorted(tensors.values(), key=lambda t: (t.begin, t.end)):
        if tensor.begin != expected:
            kind = "overlaps what comes before" if tensor.begin < expected else "leaves a hole"
            raise HeaderError(
                f"{shard}: tensor {tensor.name} {kind}: it begins at byte {tensor.begin:,}, "
                f"{expected:,} was expected. Fetch the file again."
            )
        expected = tensor.end
    if expected != file_size:
        raise HeaderError(
            f"{shard}: the header describes {expected:,} bytes, the file has {file_size:,}. "
            "The download stopped early or something was appended; fetch the file again."
        )
    return tensors


def _json_object(text: bytes, shard: str) -> dict[str, Any]:
    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) != len(pairs):
            twice, times = Counter(name for name, _ in pairs).most_common(1)[0]
            raise HeaderError(
                f"{shard}: the header names {shorten(twice)} {times} times. Fetch the file again."
            )
        return fields

    require_few_values(text, f"{shard}: the header")
    try:
        value = json.loads(text, object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        raise HeaderError(
            f"{shard}: the header is not JSON ({error}). Fetch the file again."
        ) from None
    if not isinstance(value, dict):
        raise HeaderError(f"{shard}: the header is no JSON object. Fetch the file again.")
    return cast("dict[str, Any]", value)


def _tensor(name: str, entry: Any, shard: str, data_begin: int, file_size: int) -> TensorInfo:
    if len(name) > _MAX_NAME or not (name.isascii() and name.isprintable()):
        raise HeaderError(
            f"{shard}: {shorten(name)} is no tensor name. This is no weight shard; fetch the file "
            "again."
        )
    where = f"{shard}: tensor {name}"
    if not isinstance(entry, dict):
        raise HeaderError(f"{where}: the header entry is no JSON object. Fetch the file again.")
    fields = cast("dict[str, Any]", entry)
    dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in ITEM_SIZE:
        raise HeaderError(f"{where}: dtype {shorten(dtype)} is not one of {', '.join(ITEM_SIZE)}.")
    dims = _naturals(shape, where, "shape")
    if len(dims) > _MAX_DIMS or math.prod(dims) > _MAX_ELEMENTS:
        raise HeaderError(f"{where}: shape {shorten(shape)} is beyond any real weight.")
    span = _naturals(offsets, where, "data_offsets")
    if len(span) != 2:
        raise HeaderError(f"{where}: data_offsets has {len(span)} numbers, 2 are needed.")
    begin, end = data_begin + span[0], data_begin + span[1]
    if end > file_size or begin > end:
        raise HeaderError(
            f"{where}: the header places it at bytes {begin:,} to {end:,}, the file has "
            f"{file_size:,}. The download stopped early; fetch the file again."
        )
    needed = math.prod(dims) * ITEM_SIZE[dtype]
    if end - begin != needed:
        raise HeaderError(
            f"{where}: shape {list(dims)} of {dtype} needs {needed:,} bytes, the header gives it "
            f"{end - begin:,}. Fetch the file again."
        )
    return TensorInfo(name, dtype, dims, shard, begin, end)


def _naturals(value: Any, where: str, field: str) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n <= _MAX_ELEMENTS
        for n in cast("list[Any]", value)
    ):
        raise HeaderError(f"{where}: {field} {shorten(value)} is no list of natural numbers.")
    return tuple(cast("list[int]", value))


def require_few_values(text: bytes, what: str) -> None:
    """Check, before Python makes objects of it, that some JSON cannot fill the memory.

    Raises:
        HeaderError: it may hold more than `MAX_JSON_VALUES` values.
    """
    values = sum(text.count(mark) for mark in (b",", b"[", b"{"))
    if values > MAX_JSON_VALUES:
        raise HeaderError(
            f"{what} has up to {values:,} values, more than the {MAX_JSON_VALUES:,} that are "
            "accepted. This is no checkpoint of GLM; fetch the file again."
        )


def shorten(value: Any) -> str:
    """Return a value from elsewhere in a form that a terminal can show: ASCII, one short line."""
    try:
        text = ascii(value)
    except RecursionError:
        text = "(deeply nested)"
    return text if len(text) <= 80 else f"{text[:77]}..."
