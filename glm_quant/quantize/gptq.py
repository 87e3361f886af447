"""`gptq`: codes that make up for each other's errors, in the same bytes as `search`.

A layer's output error is (w - ŵ)·H·(w - ŵ)ᵀ with H = E[x xᵀ] of its inputs, not a sum over columns:
what rounding one weight adds, the columns after it can take away again, as far as their inputs move
together (GPTQ, arXiv:2210.17323). Columns are taken in order. Each group gets scale and bias from
`search` on the weights as they are by then; each column's nearest code is chosen, and its error is
spread over the columns to the right:

    eⱼ = (wⱼ - ŵⱼ) / Uⱼⱼ        wₖ ← wₖ - eⱼ·Uⱼₖ  for k > j

U [width, width] is the upper Cholesky factor of H⁻¹, which calibration has made (H with a share of
its mean diagonal added, so that what was not seen stays put). What a reader would get wrong: U is
data, made once and known by its digest; here are only single IEEE operations in a fixed order, so
all machines that have the same U make the same bytes. The cost is rows · width² multiplications.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_quant.compiled import compiled
from glm_quant.quantize.affine import Bits, from_float32, recoder, to_float32
from glm_quant.quantize.search import quantize_search

# Rows that go through all columns together: their float32 weights stay in a core's cache.
_ROWS = 64


def quantize_gptq(
    weights: Bits,
    dtype: str,
    bits: int,
    group_size: int,
    factor: NDArray[np.float32],
    energy: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.uint32], Bits, Bits]:
    """Quantize rows of weights.

    Args:
        weights: [rows, width], finite values as the bits of their dtype.
        dtype: "BF16", "F16" or "F32".
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: divides width.
        factor: U, [width, width], upper triangular, positive on the diagonal.
        energy: as for `quantize_search`, which chooses the scales.

    Returns:
        As `affine.quantize_affine`.
    """
    rows, width = weights.shape
    codes = np.empty((rows, width), np.float32)
    scales = np.empty((rows, width // group_size), weights.dtype)
    biases = np.empty_like(scales)
    per_unit = rows if energy is None else rows // len(energy)
    blocks = [
        (unit, slice(first, min(first + _ROWS, (unit + 1) * per_unit)))
        for unit in range(rows // per_unit)
        for first in range(unit * per_unit, (unit + 1) * per_unit, _ROWS)
    ]
    for unit, part in blocks:
        left = to_float32(np.ascontiguousarray(weights[part]), dtype)
        own = None if energy is None else energy[unit][None]
        for group in range(width // group_size):
            columns = slice(group * group_size, (group + 1) * group_size)
            now = from_float32(np.ascontiguousarray(left[:, columns]), dtype)
            loud = None if own is None else np.ascontiguousarray(own[:, columns])
            _, s, b = quantize_search(now, dtype, bits, group_size, loud)
            scales[part, group], biases[part, group] = s[:, 0], b[:, 0]
            _spread(
                left,
                columns.start,
                (to_float32(s[:, 0], dtype), to_float32(b[:, 0], dtype)),
                np.float32((1 << bits) - 1),
                factor,
                codes[part],
                np.empty(group_size, np.float32),
            )
    return _packed(codes, bits, group_size), scales, biases


def _packed(codes: NDArray[np.float32], bits: int, group_size: int) -> NDArray[np.uint32]:
    """Pack codes [rows, width]: with scale 1 and bias 0 each is its own nearest code."""
    rows, width = codes.shape
    words = np.empty((rows, width * bits // 32), np.uint32)
    groups = codes.size // group_size
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    every = np.ones(groups, np.bool_)
    recoder(bits)(codes.reshape(-1), ones, zeros, every, words.reshape(-1))
    return words


@compiled
def _spread(
    left: Any, first: Any, grid: Any, n: Any, factor: Any, codes: Any, errors: Any
) -> None:  # pragma: no cover - compiled
    """Choose a group's codes in every row, and spread their errors over what is left of the row."""
    scales, biases = grid
    zero = np.float32(0)
    size, width = errors.size, left.shape[1]
    for row in range(left.shape[0]):
        s, b = scales[row], biases[row]
        w = left[row]
        for j in range(size):
            column = first + j
            code = zero
            if s != zero:
                code = min(max(np.rint((w[column] - b) / s), zero), n)
            codes[row, column] = code
            error = (w[column] - (code * s + b)) / factor[column, column]
            errors[j] = error
            for k in range(column + 1, first + size):
                w[k] -= error * factor[column, k]
        for j in range(size):
            error = errors[j]
            line = factor[first + j]
            for k in range(first + size, width):
                w[k] -= error * line[k]
