"""`search`: better scales and biases for MLX's affine format, in the same bytes.

A group of weights w is stored as ŵ = s·q + b with codes q in 0 … n, n = 2ᴮ - 1. MLX's own choice
of s and b (`affine`) keeps the end of larger magnitude and zero exact; in 2 bits that leaves the
levels {a, a/2, 0, -a/2}, which clip the other end at half its range. Here the weighted error

    Σ hⱼ·(wⱼ - ŵⱼ)²,    hⱼ = Iⱼ·√(¾σ² + wⱼ²),    σ² = mean w² of the group

is minimized instead, with Iⱼ = E[xⱼ²] of the inputs that the weight's column meets, the column's
importance (1 if unknown). The root is llama.cpp's for imatrix quantization: without it, large
weights shrink and the layer's output with them. From several clipped ranges, Lloyd's steps
alternate between the nearest codes and the least-squares s and b for these codes:

    s = (H·Y - X·L) / (H·Q - L²)    b = (X - s·L) / H
    with H = Σh, L = Σhq, Q = Σhq², X = Σhw, Y = Σhqw

The s and b of a step are rounded to their stored dtype *before* they are scored, and MLX's own
solution is a candidate. So a group's weighted error is never above MLX's, and a group for which the
search finds nothing better keeps MLX's bytes. All of it is done by compiled loops on the CPU
(`search_loops`), so that every machine gives the same bytes.
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from glm_quant.codes.affine import (
    Bits,
    from_float32,
    quantize_unrounded,
    recoder,
    to_float32,
)
from glm_quant.codes.search_loops import DROPPED, LIMIT, new_lanes, search

# Ranges to begin with, as shares of the way from a group's mean to its ends. In more bits the best
# range is nearer to the whole one, and fewer starts find it.
_SHARES = {
    2: (1.0, 0.8, 0.6, 0.45),
    3: (1.0, 0.85, 0.7),
    4: (1.0, 0.9, 0.8),
    5: (1.0, 0.9),
    6: (1.0, 0.95),
    8: (1.0,),
}

# A slack that stands for no bound.
_ANY = 1e6


@dataclass(frozen=True)
class Search:
    """What is minimized, and within what.

    Attributes:
        slack: how many times MLX's largest error of a group the new one may be.
        magnitudes: weigh by √(¾σ² + w²); plain squared error otherwise.
    """

    slack: float = 1.0
    magnitudes: bool = True


DEFAULT = Search()


def quantize_search(
    weights: Bits,
    dtype: str,
    bits: int,
    group_size: int,
    importance: NDArray[np.float32] | None = None,
    settings: Search = DEFAULT,
) -> tuple[NDArray[np.uint32], Bits, Bits]:
    """Quantize rows of weights.

    Args:
        weights: [rows, width], finite values as the bits of their dtype.
        dtype: "BF16", "F16" or "F32".
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: divides width.
        importance: E[x²] of the inputs, [units, width], positive, mean about 1: each row of it is
            for rows / units rows of weights. None: all are 1.
        settings: what to minimize.

    Returns:
        As `affine.quantize_affine`.
    """
    rows, width = weights.shape
    codes, scales, biases = quantize_unrounded(weights, dtype, bits, group_size)
    if importance is None:
        importance = np.ones((1, width), np.float32)
    values, improved = to_float32(weights, dtype).reshape(-1), np.zeros(scales.size, np.bool_)
    grids = scales.reshape(-1), biases.reshape(-1)
    search(
        (values, np.ascontiguousarray(importance).reshape(-1)),
        (group_size, width, rows // len(importance)),
        np.array(list(product(_SHARES[bits], repeat=2)), np.float32),
        (np.float32((1 << bits) - 1), DROPPED[dtype], np.float32(LIMIT[dtype])),
        (np.float32(min(settings.slack, _ANY)), settings.magnitudes),
        new_lanes(),
        (*grids, improved),
    )
    # Where nothing better was found, codes stay those of MLX's unrounded s and b.
    recoder(bits)(values, *grids, improved, codes.reshape(-1))
    return codes, from_float32(scales, dtype), from_float32(biases, dtype)
