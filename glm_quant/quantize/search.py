"""`search`: better scales and biases for MLX's affine format, in the same bytes.

A group of weights w is stored as ŵ = s·q + b with codes q in 0 … n, n = 2ᴮ - 1. MLX's own choice
of s and b (`affine`) keeps the end of larger magnitude and zero exact; in 2 bits that leaves the
levels {a, a/2, 0, -a/2}, which clip the other end at half its range. Here the weighted error

    Σ hⱼ·(wⱼ - ŵⱼ)²,    hⱼ = Eⱼ·√(¾σ² + wⱼ²),    σ² = mean w² of the group

is minimized instead, with Eⱼ = E[xⱼ²] of the inputs that the weight's column meets (1 if unknown).
The root is llama.cpp's importance for imatrix quantization: without it, large weights shrink and
the layer's output with them. From several clipped ranges, Lloyd's steps alternate between the
nearest codes and the least-squares s and b for these codes:

    s = (H·Y - X·L) / (H·Q - L²)    b = (X - s·L) / H
    with H = Σh, L = Σhq, Q = Σhq², X = Σhw, Y = Σhqw

What a reader would get wrong: s and b are rounded to their stored dtype *before* they are scored,
and MLX's own solution is a candidate. So a group's weighted error is never above MLX's, and a group
for which the search finds nothing better keeps MLX's bytes.

The loop holds 16 groups side by side, one a lane, and each lane adds up in the order of its
weights. So it is vectorized and yet the same IEEE operations in the same order on every machine:
the bytes do not depend on the width of its vectors.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from glm_quant.compiled import compiled
from glm_quant.quantize.affine import (
    Bits,
    from_float32,
    quantize_unrounded,
    recoder,
    to_float32,
)

_LANES = 16

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
# Lloyd's steps from each start.
_STEPS = 4

# A slack that stands for no bound.
_ANY = 1e6

# Bits of a float32's fraction that the dtypes drop.
_DROPPED_BY_F16 = 13
_DROPPED = {"BF16": 16, "F16": _DROPPED_BY_F16, "F32": 0}
# The largest finite values; float32's is never met.
LIMIT = {"BF16": 3e38, "F16": 65504.0, "F32": 3e38}

# Beyond these a product of three could leave float32's normal range; such groups keep MLX's bytes.
_SMALLEST, _LARGEST = np.float32(2.0**-32), np.float32(2.0**32)


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
    energy: NDArray[np.float32] | None = None,
    settings: Search = DEFAULT,
) -> tuple[NDArray[np.uint32], Bits, Bits]:
    """Quantize rows of weights.

    Args:
        weights: [rows, width], finite values as the bits of their dtype.
        dtype: "BF16", "F16" or "F32".
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: divides width.
        energy: E[x²] of the inputs, [units, width], positive, mean about 1: each row of it is for
            rows / units rows of weights. None: all are 1.
        settings: what to minimize.

    Returns:
        As `affine.quantize_affine`.
    """
    rows, width = weights.shape
    codes, scales, biases = quantize_unrounded(weights, dtype, bits, group_size)
    if energy is None:
        energy = np.ones((1, width), np.float32)
    starts = [(low, high) for low in _SHARES[bits] for high in _SHARES[bits]]
    values = to_float32(weights, dtype).reshape(-1)
    better = np.zeros(scales.size, np.bool_)
    _search(
        values,
        np.ascontiguousarray(energy).reshape(-1),
        (group_size, width, rows // len(energy)),
        np.array(starts, np.float32),
        (np.float32((1 << bits) - 1), _DROPPED[dtype], np.float32(LIMIT[dtype])),
        (np.float32(min(settings.slack, _ANY)), settings.magnitudes),
        _new_lanes(),
        (scales.reshape(-1), biases.reshape(-1), better),
    )
    recoder(bits)(values, scales.reshape(-1), biases.reshape(-1), better, codes.reshape(-1))
    return codes, from_float32(scales, dtype), from_float32(biases, dtype)


@compiled
def _round(values: Any, dropped: Any) -> None:  # pragma: no cover - compiled
    """Round to a dtype in place, halves to even, by its count of dropped bits."""
    if dropped == 0:
        return
    half, smallest_normal = np.float32(0.5), np.float32(2.0**-14)
    below = (np.uint32(1) << np.uint32(dropped - 1)) - np.uint32(1)
    mask = np.uint32(0xFFFFFFFF) << np.uint32(dropped)
    pattern = values.view(np.uint32)
    for i in range(values.size):
        size = abs(values[i])
        if dropped == _DROPPED_BY_F16 and size < smallest_normal:
            # Adding a half leaves exactly float16's 24 binary places.
            size = (size + half) - half
            values[i] = -size if values[i] < 0 else size
        else:
            odd = (pattern[i] >> np.uint32(dropped)) & np.uint32(1)
            pattern[i] = (pattern[i] + below + odd) & mask


class _Lanes(NamedTuple):
    """What the loop knows of 16 groups, each [lanes]: arrays, as numba sees them.

    `found` [5, lanes] is what `evaluate` finds: Σh(w - ŵ)², max|w - ŵ|, Σhq, Σhq², Σhqw.
    """

    low: Any
    high: Any
    mean: Any
    power: Any
    sum_h: Any
    sum_hw: Any
    mlx_s: Any
    mlx_b: Any
    next_s: Any
    next_b: Any
    s: Any
    b: Any
    best_s: Any
    best_b: Any
    best: Any
    allowed: Any
    found: Any


def _new_lanes() -> _Lanes:
    rows = np.zeros((len(_Lanes._fields) - 1, _LANES), np.float32)
    return _Lanes._make([*rows, np.zeros(5 * _LANES, np.float32)])


@compiled
def _load(
    source: Any, energy: Any, shape: Any, first: Any, last: Any, w: Any, h: Any
) -> None:  # pragma: no cover - compiled
    """Lay 16 groups side by side, with the energies of their columns; the last one fills up."""
    group_size, width, rows_per_unit = shape
    for lane in range(_LANES):
        begin = min(first + lane, last) * group_size
        row = begin // width
        unit = (row // rows_per_unit) * width + begin - row * width
        for j in range(group_size):
            w[j * _LANES + lane] = source[begin + j]
            h[j * _LANES + lane] = energy[unit + j]


@compiled
def _survey(w: Any, at: Any) -> None:  # pragma: no cover - compiled
    """Find each group's smallest and largest weight, its mean, and its mean square."""
    size = w.size // _LANES
    for lane in range(_LANES):
        at.low[lane] = at.high[lane] = w[lane]
        at.mean[lane] = at.power[lane] = np.float32(0)
    for j in range(size):
        for lane in range(_LANES):
            x = w[j * _LANES + lane]
            at.low[lane] = min(at.low[lane], x)
            at.high[lane] = max(at.high[lane], x)
            at.mean[lane] += x
            at.power[lane] += x * x
    for lane in range(_LANES):
        at.mean[lane] /= np.float32(size)
        at.power[lane] /= np.float32(size)


@compiled
def _set_aside(w: Any, at: Any) -> None:  # pragma: no cover - compiled
    """Empty the groups that are not searched: nothing is better than their error of 0."""
    zero, one = np.float32(0), np.float32(1)
    for lane in range(_LANES):
        size = max(abs(at.low[lane]), abs(at.high[lane]))
        if at.best_s[lane] == zero or not _SMALLEST <= size <= _LARGEST:
            for j in range(w.size // _LANES):
                w[j * _LANES + lane] = zero
            at.low[lane] = at.high[lane] = at.mean[lane] = at.power[lane] = zero
            at.mlx_s[lane] = at.best_s[lane] = one
            at.mlx_b[lane] = at.best_b[lane] = zero


@compiled
def _weigh(w: Any, h: Any, magnitudes: Any, at: Any) -> None:  # pragma: no cover - compiled
    """Turn energies into importances, and sum them."""
    share = np.float32(0.75)
    for lane in range(_LANES):
        at.sum_h[lane] = at.sum_hw[lane] = np.float32(0)
    for j in range(w.size // _LANES):
        for lane in range(_LANES):
            i = j * _LANES + lane
            if magnitudes:
                h[i] *= np.sqrt(share * at.power[lane] + w[i] * w[i])
            at.sum_h[lane] += h[i]
            at.sum_hw[lane] += h[i] * w[i]


@compiled
def _evaluate(
    w: Any, h: Any, n: Any, code_s: Any, code_b: Any, s: Any, b: Any, found: Any
) -> None:  # pragma: no cover - compiled
    """Find the nearest codes under one s and b, and what they are worth.

    Codes come from `code_s` and `code_b`, values from `s` and `b`: MLX's differ by rounding.
    """
    zero = np.float32(0)
    for i in range(found.size):
        found[i] = zero
    for j in range(w.size // _LANES):
        for lane in range(_LANES):
            x = w[j * _LANES + lane]
            weight = h[j * _LANES + lane]
            q = min(max(np.rint((x - code_b[lane]) / code_s[lane]), zero), n)
            d = x - (q * s[lane] + b[lane])
            hq = weight * q
            found[lane] += weight * d * d
            found[_LANES + lane] = max(found[_LANES + lane], abs(d))
            found[2 * _LANES + lane] += hq
            found[3 * _LANES + lane] += hq * q
            found[4 * _LANES + lane] += hq * x


@compiled
def _begin(low: Any, high: Any, n: Any, at: Any) -> None:  # pragma: no cover - compiled
    """Begin with a range: these shares of the way from each group's mean to its ends."""
    for lane in range(_LANES):
        bottom = at.mean[lane] - low * (at.mean[lane] - at.low[lane])
        top = at.mean[lane] + high * (at.high[lane] - at.mean[lane])
        at.next_s[lane], at.next_b[lane] = (top - bottom) / n, bottom
        at.s[lane], at.b[lane] = at.mlx_s[lane], at.mlx_b[lane]


@compiled
def _accept(limit: Any, at: Any) -> None:  # pragma: no cover - compiled
    """Take the next s and b where their dtype holds them."""
    for lane in range(_LANES):
        s, b = at.next_s[lane], at.next_b[lane]
        if s != np.float32(0) and abs(s) <= limit and abs(b) <= limit:
            at.s[lane], at.b[lane] = s, b


@compiled
def _keep_better(at: Any) -> None:  # pragma: no cover - compiled
    """Remember s and b where they are the best so far and keep the bound."""
    for lane in range(_LANES):
        if at.found[lane] < at.best[lane] and at.found[_LANES + lane] <= at.allowed[lane]:
            at.best[lane] = at.found[lane]
            at.best_s[lane], at.best_b[lane] = at.s[lane], at.b[lane]


@compiled
def _refit(at: Any) -> None:  # pragma: no cover - compiled
    """Find the least-squares s and b for the codes; s is 0 where they do not decide it."""
    for lane in range(_LANES):
        total, x = np.float64(at.sum_h[lane]), np.float64(at.sum_hw[lane])
        linear = np.float64(at.found[2 * _LANES + lane])
        square = np.float64(at.found[3 * _LANES + lane])
        y = np.float64(at.found[4 * _LANES + lane])
        spread = total * square - linear * linear
        at.next_s[lane] = at.next_b[lane] = np.float32(0)
        if spread > np.float64(1e-6) * total * square:
            scale = (total * y - x * linear) / spread
            at.next_s[lane] = np.float32(scale)
            at.next_b[lane] = np.float32((x - scale * linear) / total)


@compiled
def _start_from_mlx(
    w: Any, h: Any, form: Any, settings: Any, at: Any
) -> None:  # pragma: no cover - compiled
    """Score MLX's own solution, which `mlx_s` and `mlx_b` hold unrounded: the one to beat."""
    n, dropped, _ = form
    slack, magnitudes = settings
    for lane in range(_LANES):
        at.best_s[lane], at.best_b[lane] = at.mlx_s[lane], at.mlx_b[lane]
    _round(at.best_s, dropped)
    _round(at.best_b, dropped)
    _set_aside(w, at)
    _weigh(w, h, magnitudes, at)
    _evaluate(w, h, n, at.mlx_s, at.mlx_b, at.best_s, at.best_b, at.found)
    for lane in range(_LANES):
        at.best[lane] = at.found[lane]
        at.allowed[lane] = at.found[_LANES + lane] * slack
        at.mlx_s[lane], at.mlx_b[lane] = at.best_s[lane], at.best_b[lane]


@compiled
def _search(
    source: Any,
    energy: Any,
    shape: Any,
    starts: Any,
    form: Any,
    settings: Any,
    at: Any,
    result: Any,
) -> None:  # pragma: no cover - compiled
    """Replace MLX's s and b by better ones, rounded, and mark the groups where it was done."""
    n, dropped, limit = form
    scales, biases, better = result
    w = np.empty(shape[0] * _LANES, np.float32)
    h = np.empty_like(w)
    last = scales.size - 1
    for first in range(0, scales.size, _LANES):
        _load(source, energy, shape, first, last, w, h)
        _survey(w, at)
        for lane in range(_LANES):
            at.mlx_s[lane] = scales[min(first + lane, last)]
            at.mlx_b[lane] = biases[min(first + lane, last)]
        _start_from_mlx(w, h, form, settings, at)
        for i in range(len(starts)):
            _begin(starts[i, 0], starts[i, 1], n, at)
            for _ in range(_STEPS):
                _round(at.next_s, dropped)
                _round(at.next_b, dropped)
                _accept(limit, at)
                _evaluate(w, h, n, at.s, at.b, at.s, at.b, at.found)
                _keep_better(at)
                _refit(at)
        for lane in range(min(_LANES, scales.size - first)):
            if at.best_s[lane] != at.mlx_s[lane] or at.best_b[lane] != at.mlx_b[lane]:
                scales[first + lane], biases[first + lane] = at.best_s[lane], at.best_b[lane]
                better[first + lane] = True
