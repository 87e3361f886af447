"""One block of rows to its stored bytes: the only place where weights change value.

Blocks are numpy arrays of the bits of their dtype, since numpy has no bfloat16. The affine schemes
are our own loops (`affine`, `search`, `gptq`); the mx and nv formats are mx.quantize's, on the CPU
of every machine. mx.quantize returns plausible numbers for NaN input, so every value is looked at
first.
"""

import threading
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.reader import as_array
from glm_quant.codes.affine import (
    Bits,
    from_float32,
    largest_magnitude,
    quantize_affine,
    to_float32,
)
from glm_quant.codes.gptq import quantize_gptq
from glm_quant.codes.scheme import Quantized, Scheme
from glm_quant.codes.search import quantize_search
from glm_quant.errors import WeightError

# Part of every fingerprint: raise it with any change that alters output bytes.
VERSION = 2

# The bits of infinity, without sign; what is at or above is Inf or NaN (IEEE 754).
_INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
# The largest finite values of the narrow dtypes.
_MAX = {"F16": 65504.0, "BF16": 3.3895313892515355e38}

_thread = threading.local()


class Rows(NamedTuple):
    """A block of a weight: [rows, width] as the bits of `dtype`."""

    bits: Bits
    dtype: str


def require_finite(rows: Rows, where: str) -> None:
    """Look at every value of a block; integers are always finite.

    Args:
        rows: the block.
        where: "shard: tensor name", for the message.

    Raises:
        WeightError: a value is NaN or Inf.
    """
    bits, dtype = rows
    # A look at the bits first: it is vectorized, and nearly always all that is needed.
    if dtype in _INFINITY and bits.size and largest_magnitude(bits) >= _INFINITY[dtype]:
        bad = np.flatnonzero(~np.isfinite(to_float32(bits, dtype)))
        row, column = divmod(int(bad[0]), bits.shape[-1])
        raise WeightError(
            f"{where}: {bad.size:,} of {bits.size:,} values are NaN or Inf, the first in row "
            f"{row}, column {column} of the block. Fetch the shard again; if it is the same, the "
            "release itself is broken."
        )


def encode(
    rows: Rows,
    scheme: Scheme,
    where: str,
    importance: NDArray[np.float32] | None = None,
    factor: NDArray[np.float32] | None = None,
) -> list[NDArray[Any]]:
    """Return a weight's stored tensors, [rows, ...] each, in the order of `scheme.layouts`.

    Floating dtypes come as their bits.

    Args:
        rows: in the source's dtype.
        scheme: what to make of it.
        where: for messages.
        importance: E[x²] of the inputs, for `search`: see there.
        factor: of their covariance, for `gptq`, which is `search` without it.

    Raises:
        WeightError: a value does not fit the target dtype.
    """
    if not isinstance(scheme, Quantized):
        return [_cast(rows, scheme.dtype, where)]
    if scheme.mode == "affine":
        codes, scales, biases = _quantize_affine(rows, scheme, importance, factor)
        if largest_magnitude(scales) >= _INFINITY[rows.dtype]:
            bad = int((~np.isfinite(to_float32(scales, rows.dtype))).sum())
            raise WeightError(
                f"{where}: {bad:,} of {scales.size:,} scales would be infinite, for the weights "
                "span more than their dtype holds. Fetch the shard again, or give this weight a "
                "`dtype` in the recipe."
            )
        return [codes, scales, biases]
    return _quantize_with_mlx(rows, scheme)


def _quantize_affine(
    rows: Rows,
    scheme: Quantized,
    importance: NDArray[np.float32] | None,
    factor: NDArray[np.float32] | None,
) -> tuple[NDArray[np.uint32], Bits, Bits]:
    if factor is not None:
        return quantize_gptq(*rows, scheme.bits, scheme.group_size, factor, importance)
    if scheme.quantizer != "minmax":
        return quantize_search(*rows, scheme.bits, scheme.group_size, importance)
    return quantize_affine(*rows, scheme.bits, scheme.group_size)


def _cast(rows: Rows, dtype: str, where: str) -> Bits:
    if dtype == rows.dtype:
        return np.ascontiguousarray(rows.bits)
    values = to_float32(*rows)
    if dtype in _MAX:
        largest = float(np.abs(values).max(initial=0))
        if largest > _MAX[dtype]:
            raise WeightError(
                f"{where}: the largest magnitude is {largest:g}, {dtype} ends at {_MAX[dtype]:g}. "
                "Give this weight a wider `dtype` in the recipe, such as `dtype: source`."
            )
    return from_float32(values, dtype)


def _quantize_with_mlx(rows: Rows, scheme: Quantized) -> list[NDArray[Any]]:
    # On the CPU everywhere: mx.quantize's GPU kernels round halves differently.
    with mx.stream(cpu_stream()):
        weights = as_array(np.ascontiguousarray(rows.bits).data, rows.dtype, rows.bits.shape)
        stored = mx.quantize(
            weights, group_size=scheme.group_size, bits=scheme.bits, mode=scheme.mode
        )
        mx.eval(stored)
        return [np.asarray(array) for array in stored]


def cpu_stream() -> mx.Stream:
    """Return this thread's own stream of the CPU: MLX's streams belong to threads."""
    if not hasattr(_thread, "stream"):
        _thread.stream = mx.new_stream(mx.Device(mx.cpu))
    return _thread.stream
