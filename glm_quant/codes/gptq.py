"""`gptq`: codes that make up for each other's errors, in the same bytes as `search`.

A layer's output error is (w - ŵ)·H·(w - ŵ)ᵀ with H = E[x xᵀ] of its inputs, not a sum over columns:
what rounding one weight adds, the columns after it can take away again, as far as their inputs move
together (GPTQ, arXiv:2210.17323). Columns are taken in order. Each group gets scale and bias from
`search` on the weights as they are by then, refined by what the output loses (`gptq_group`); each
column's nearest code is chosen, and its error is spread over the columns to the right:

    eⱼ = (wⱼ - ŵⱼ) / Uⱼⱼ        wₖ ← wₖ - eⱼ·Uⱼₖ  for k > j

U [width, width] is the upper Cholesky factor of H⁻¹, which calibration has made (H with a share of
its mean diagonal added, so that a column that calibration did not excite stays as it is). U is
data, made once and known by its digest; here are only single IEEE operations in a fixed order, so
all machines that have the same U make the same bytes. The cost is rows · width² multiplications.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_quant.codes.affine import Bits, from_float32, recoder, to_float32
from glm_quant.codes.gptq_group import Grid, Group
from glm_quant.codes.search import quantize_search
from glm_quant.compiled import compiled

# Rows that go through all columns together, at 6 MB for GLM-5.2's widest.
_ROWS = 256
# Columns of a tile: with a group's rows of U, 32 KB.
_TILE = 128


def quantize_gptq(
    weights: Bits,
    dtype: str,
    bits: int,
    group_size: int,
    factor: NDArray[np.float32],
    importance: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.uint32], Bits, Bits]:
    """Quantize rows of weights.

    Args:
        weights: [rows, width], finite values as the bits of their dtype.
        dtype: "BF16", "F16" or "F32".
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: divides width.
        factor: U, [width, width], upper triangular, positive on the diagonal.
        importance: as for `quantize_search`, which chooses the scales.

    Returns:
        As `affine.quantize_affine`.
    """
    rows, width = weights.shape
    codes = np.empty((rows, width), np.float32)
    scales = np.empty((rows, width // group_size), weights.dtype)
    biases = np.empty_like(scales)
    per_unit = rows if importance is None else rows // len(importance)
    for first in range(0, rows, per_unit):
        unit = None if importance is None else importance[first // per_unit][None]
        for begin in range(first, first + per_unit, _ROWS):
            part = slice(begin, min(begin + _ROWS, first + per_unit))
            updated = to_float32(np.ascontiguousarray(weights[part]), dtype)
            for group in range(width // group_size):
                columns = slice(group * group_size, (group + 1) * group_size)
                group_importance = None if unit is None else np.ascontiguousarray(unit[:, columns])
                grid, codes[part, columns], errors = _quantize_group(
                    updated[:, columns], dtype, bits, factor[columns, columns], group_importance
                )
                scales[part, group], biases[part, group] = (from_float32(v, dtype) for v in grid)
                _spread(updated, columns.stop, errors, factor[columns])
    return _packed(codes, bits, group_size), scales, biases


def _quantize_group(
    weights: NDArray[np.float32],
    dtype: str,
    bits: int,
    factor: NDArray[np.float32],
    importance: NDArray[np.float32] | None,
) -> tuple[Grid, NDArray[np.float32], NDArray[np.float32]]:
    """Quantize a group's columns in some rows.

    Returns:
        Scale and bias of each row, codes [rows, columns], and errors to spread [columns, rows].
    """
    stored = from_float32(np.ascontiguousarray(weights), dtype)
    _, s, b = quantize_search(stored, dtype, bits, weights.shape[1], importance)
    group = Group(weights, factor, np.float32((1 << bits) - 1))
    grid = group.refine((to_float32(s[:, 0], dtype), to_float32(b[:, 0], dtype)), dtype)
    errors = group.choose(grid)
    return grid, group.codes.T, errors


def _packed(codes: NDArray[np.float32], bits: int, group_size: int) -> NDArray[np.uint32]:
    """Pack codes [rows, width]: with scale 1 and bias 0 each is its own nearest code."""
    rows, width = codes.shape
    words = np.empty((rows, width * bits // 32), np.uint32)
    groups = codes.size // group_size
    # Every group is chosen, so the words need no value before.
    ones, zeros = np.ones(groups, np.float32), np.zeros(groups, np.float32)
    every = np.ones(groups, np.bool_)
    recoder(bits)(codes.reshape(-1), ones, zeros, every, words.reshape(-1))
    return words


@compiled
def _spread(
    updated: Any, first: Any, errors: Any, factor: Any
) -> None:  # pragma: no cover - compiled
    """Spread a group's errors [columns, rows] over `updated` [rows, width] from column `first` on.

    A tile of U stays in the nearest cache for all rows, and a weight in a register for four errors:
    what a weight loses, and in which order, is as if they were taken one by one.
    """
    size, width = factor.shape
    tile = np.empty((size, _TILE), np.float32)
    for begin in range(first, width, _TILE):
        end = min(begin + _TILE, width)
        for j in range(size):
            for k in range(end - begin):
                tile[j, k] = factor[j, begin + k]
        for row in range(updated.shape[0]):
            w = updated[row, begin:end]
            for j in range(0, size, 4):
                e0, e1 = errors[j, row], errors[j + 1, row]
                e2, e3 = errors[j + 2, row], errors[j + 3, row]
                u0, u1, u2, u3 = tile[j], tile[j + 1], tile[j + 2], tile[j + 3]
                for k in range(end - begin):
                    w[k] = (((w[k] - e0 * u0[k]) - e1 * u1[k]) - e2 * u2[k]) - e3 * u3[k]
