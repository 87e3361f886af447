"""Encoding one block: mx.quantize's own bytes, and no value that nobody looked at."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from glm_quant.checkpoint.reader import as_array
from glm_quant.codes.encode import Rows, encode, require_finite
from glm_quant.codes.scheme import Quantized, Stored, layouts
from glm_quant.errors import WeightError

WHERE = "model-00001.safetensors: tensor a.weight"
BITS: dict[str, Any] = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}


def values(dtype: str, rows: int = 4, width: int = 128) -> NDArray[np.uint8]:
    normal = np.random.default_rng(3).normal(0, 0.05, (rows, width)).astype(np.float32)
    if dtype == "F16":
        return normal.astype(np.float16).reshape(-1).view(np.uint8)
    if dtype == "F32":
        return normal.reshape(-1).view(np.uint8)
    return (normal.view(np.uint32) >> 16).astype(np.uint16).reshape(-1).view(np.uint8)


def rows_of(data: NDArray[np.uint8], dtype: str, width: int = 128) -> Rows:
    rows = Rows(data.view(BITS[dtype]).reshape(-1, width), dtype)
    require_finite(rows, WHERE)
    return rows


SCHEMES = [
    *(Quantized("affine", bits, size) for bits in (2, 3, 4, 5, 6, 8) for size in (32, 64, 128)),
    Quantized("mxfp4", 4, 32),
    Quantized("nvfp4", 4, 16),
    Quantized("mxfp8", 8, 32),
]


@pytest.mark.parametrize(
    ("dtype", "scheme"),
    [("BF16", scheme) for scheme in SCHEMES]
    + [(dtype, Quantized("affine", 3, 64)) for dtype in ("F16", "F32")],
    ids=str,
)
def test_bytes_are_those_of_the_layout(dtype: str, scheme: Quantized) -> None:
    """Every scheme that a recipe can name gives as many bytes as planned, and mx.quantize's."""
    rows = rows_of(values(dtype), dtype)
    found = encode(rows, scheme, WHERE)
    with mx.stream(mx.cpu):
        weights = as_array(rows.bits.data, dtype, rows.bits.shape)
        expected = mx.quantize(
            weights, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode
        )
        raw = [np.asarray(array.view(mx.uint8)).tobytes() for array in expected]
    assert [array.tobytes() for array in found] == raw
    planned = layouts(scheme, (4, 128), dtype)
    assert [array.nbytes for array in found] == [layout.size_bytes for layout in planned]


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_stored_as_it_is(dtype: str) -> None:
    """A weight that keeps its dtype keeps its bytes."""
    data = values(dtype)
    (found,) = encode(rows_of(data, dtype), Stored(dtype), WHERE)
    assert found.tobytes() == data.tobytes()


def test_cast_to_float16() -> None:
    """A bfloat16 weight of ordinary size is float16's nearest value."""
    data = values("BF16")
    (found,) = encode(rows_of(data, "BF16"), Stored("F16"), WHERE)
    wide = (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    np.testing.assert_array_equal(found.reshape(-1).view(np.float16), wide.astype(np.float16))


@pytest.mark.parametrize(
    ("dtype", "bits"),
    [
        ("BF16", 0x7FC0),
        ("BF16", 0xFF81),
        ("BF16", 0x7F80),
        ("BF16", 0xFF80),
        ("F16", 0x7E00),
        ("F16", 0xFC00),
        ("F32", 0x7F800001),
        ("F32", 0xFF800000),
    ],
)
def test_nan_and_inf_are_named(dtype: str, bits: int) -> None:
    """One NaN or Inf of any kind is found; tensor, counts and place are named."""
    data = values(dtype)
    data.view(BITS[dtype])[2 * 128 + 5] = bits
    with pytest.raises(WeightError, match=r"a\.weight: 1 of 512 values .* row 2, column 5 of"):
        rows_of(data, dtype)


def test_largest_finite_values_pass() -> None:
    """Values just below infinity, zeros of both signs and subnormals are values."""
    data = values("BF16")
    data.view(np.uint16)[:6] = (0x7F7F, 0xFF7F, 0x0000, 0x8000, 0x0001, 0x807F)
    rows_of(data, "BF16")


@pytest.mark.parametrize(
    ("dtype", "value", "target", "message"),
    [
        ("BF16", 0x4780, "F16", r"the largest magnitude is 65536, F16 ends at 65504"),
        ("BF16", 0xC780, "F16", r"the largest magnitude is 65536, F16 ends at 65504"),
        ("F32", 0x7F7FFFFF, "BF16", r"is 3\.40282e\+38, BF16 ends at 3\.38953e\+38"),
    ],
)
def test_value_that_does_not_fit(dtype: str, value: int, target: str, message: str) -> None:
    """A value that would become infinite in the target dtype is named with both numbers."""
    data = values(dtype)
    data.view(BITS[dtype])[7] = value
    rows = rows_of(data, dtype)
    with pytest.raises(WeightError, match=message):
        encode(rows, Stored(target), WHERE)


def test_scale_that_would_be_infinite() -> None:
    """Finite weights whose range overflows are named: their scale would be infinite."""
    data = values("BF16")
    data.view(np.uint16)[:2] = (0x7F7F, 0xFF7F)
    rows = rows_of(data, "BF16")
    with pytest.raises(WeightError, match=r"1 of 8 scales would be infinite"):
        encode(rows, Quantized("affine", 2, 64), WHERE)


def test_threads_give_the_same_bytes() -> None:
    """Blocks encoded by several threads at once have the bytes of one thread."""
    data = values("BF16", 64)
    scheme = Quantized("affine", 3, 64)

    def once(_: int) -> bytes:
        rows = rows_of(data, "BF16")
        return b"".join(array.tobytes() for array in encode(rows, scheme, WHERE))

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(once, range(24)))) == 1
