"""The compiled loops of `search`.

They hold 16 groups side by side, one a lane, and each lane adds up in the order of its weights. So
they are vectorized and yet the same IEEE operations in the same order on every machine: the bytes
do not depend on the width of their vectors. Constants that a loop uses must stand in this file,
since a loop is compiled again only when its own file changes.
"""

from typing import Any, NamedTuple

import numpy as np

from glm_quant.compiled import compiled

_LANES = 16

# Lloyd's steps from each start.
STEPS = 4

# Bits of a float32's fraction that the dtypes drop.
DROPPED_BY_F16 = 13
DROPPED = {"BF16": 16, "F16": DROPPED_BY_F16, "F32": 0}
# The largest finite values; float32's is never met.
LIMIT = {"BF16": 3e38, "F16": 65504.0, "F32": 3e38}
# A refit needs codes that differ: their variance, as a share of their mean square.
DECIDED = 1e-6

# Beyond these a product of three could leave float32's normal range; such groups keep MLX's bytes.
_SMALLEST, _LARGEST = np.float32(2.0**-32), np.float32(2.0**32)


@compiled
def round_to(values: Any, dropped: Any) -> None:  # pragma: no cover - compiled
    """Round to a dtype in place, halves to even, by its count of dropped bits."""
    if dropped == 0:
        return
    half, smallest_normal = np.float32(0.5), np.float32(2.0**-14)
    below = (np.uint32(1) << np.uint32(dropped - 1)) - np.uint32(1)
    mask = np.uint32(0xFFFFFFFF) << np.uint32(dropped)
    pattern = values.view(np.uint32)
    for i in range(values.size):
        size = abs(values[i])
        if dropped == DROPPED_BY_F16 and size < smallest_normal:
            # Adding a half leaves exactly float16's 24 binary places.
            size = (size + half) - half
            values[i] = -size if values[i] < 0 else size
        else:
            odd = (pattern[i] >> np.uint32(dropped)) & np.uint32(1)
            pattern[i] = (pattern[i] + below + odd) & mask


class _Lanes(NamedTuple):
    """What the loop knows of 16 groups, each [lanes]: arrays, as numba sees them.

    `sums` [5 · lanes] is what `_evaluate` fills: Σh(w - ŵ)², max|w - ŵ|, Σhq, Σhq², Σhqw.
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
    sums: Any


def new_lanes() -> _Lanes:
    """Return room for what the loops know of the groups at hand."""
    rows = np.zeros((len(_Lanes._fields) - 1, _LANES), np.float32)
    return _Lanes._make([*rows, np.zeros(5 * _LANES, np.float32)])


@compiled
def _load(
    inputs: Any, shape: Any, first: Any, last: Any, w: Any, h: Any
) -> None:  # pragma: no cover - compiled
    """Lay 16 groups side by side, with the importance of their columns; the last one fills up."""
    source, importance = inputs
    group_size, width, rows_per_unit = shape
    for lane in range(_LANES):
        begin = min(first + lane, last) * group_size
        row = begin // width
        unit = (row // rows_per_unit) * width + begin - row * width
        for j in range(group_size):
            w[j * _LANES + lane] = source[begin + j]
            h[j * _LANES + lane] = importance[unit + j]


@compiled
def _load_grids(
    scales: Any, biases: Any, first: Any, at: Any
) -> None:  # pragma: no cover - compiled
    """Load what MLX's codes came from; the last group fills up."""
    for lane in range(_LANES):
        group = min(first + lane, scales.size - 1)
        at.mlx_s[lane], at.mlx_b[lane] = scales[group], biases[group]


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
    zero, unit = np.float32(0), np.float32(1)
    for lane in range(_LANES):
        size = max(abs(at.low[lane]), abs(at.high[lane]))
        if at.best_s[lane] == zero or not _SMALLEST <= size <= _LARGEST:
            for j in range(w.size // _LANES):
                w[j * _LANES + lane] = zero
            at.low[lane] = at.high[lane] = at.mean[lane] = at.power[lane] = zero
            at.mlx_s[lane] = at.best_s[lane] = unit
            at.mlx_b[lane] = at.best_b[lane] = zero


@compiled
def _weigh(w: Any, h: Any, magnitudes: Any, at: Any) -> None:  # pragma: no cover - compiled
    """Turn importances into the weights of errors, and sum them."""
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
    w: Any, h: Any, n: Any, code_grid: Any, grid: Any, sums: Any
) -> None:  # pragma: no cover - compiled
    """Find the nearest codes under a grid (s and b), and what they are worth.

    Codes come from `code_grid`, values from `grid`: MLX's differ by rounding.
    """
    code_s, code_b = code_grid
    s, b = grid
    zero = np.float32(0)
    for i in range(sums.size):
        sums[i] = zero
    for j in range(w.size // _LANES):
        for lane in range(_LANES):
            x = w[j * _LANES + lane]
            weight = h[j * _LANES + lane]
            q = min(max(np.rint((x - code_b[lane]) / code_s[lane]), zero), n)
            d = x - (q * s[lane] + b[lane])
            hq = weight * q
            sums[lane] += weight * d * d
            sums[_LANES + lane] = max(sums[_LANES + lane], abs(d))
            sums[2 * _LANES + lane] += hq
            sums[3 * _LANES + lane] += hq * q
            sums[4 * _LANES + lane] += hq * x


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
        if at.sums[lane] < at.best[lane] and at.sums[_LANES + lane] <= at.allowed[lane]:
            at.best[lane] = at.sums[lane]
            at.best_s[lane], at.best_b[lane] = at.s[lane], at.b[lane]


@compiled
def _refit(at: Any) -> None:  # pragma: no cover - compiled
    """Find the least-squares s and b for the codes; s is 0 where they do not decide it."""
    for lane in range(_LANES):
        total, x = np.float64(at.sum_h[lane]), np.float64(at.sum_hw[lane])
        linear = np.float64(at.sums[2 * _LANES + lane])
        square = np.float64(at.sums[3 * _LANES + lane])
        y = np.float64(at.sums[4 * _LANES + lane])
        spread = total * square - linear * linear
        at.next_s[lane] = at.next_b[lane] = np.float32(0)
        if spread > np.float64(DECIDED) * total * square:
            scale = (total * y - x * linear) / spread
            at.next_s[lane] = np.float32(scale)
            at.next_b[lane] = np.float32((x - scale * linear) / total)


@compiled
def _start_from_mlx(
    w: Any, h: Any, numbers: Any, settings: Any, at: Any
) -> None:  # pragma: no cover - compiled
    """Score MLX's own solution, which `mlx_s` and `mlx_b` hold unrounded: the one to beat."""
    n, dropped, _ = numbers
    slack, magnitudes = settings
    for lane in range(_LANES):
        at.best_s[lane], at.best_b[lane] = at.mlx_s[lane], at.mlx_b[lane]
    round_to(at.best_s, dropped)
    round_to(at.best_b, dropped)
    _set_aside(w, at)
    _weigh(w, h, magnitudes, at)
    _evaluate(w, h, n, (at.mlx_s, at.mlx_b), (at.best_s, at.best_b), at.sums)
    for lane in range(_LANES):
        at.best[lane] = at.sums[lane]
        at.allowed[lane] = at.sums[_LANES + lane] * slack
        at.mlx_s[lane], at.mlx_b[lane] = at.best_s[lane], at.best_b[lane]


@compiled
def search(
    inputs: Any, shape: Any, starts: Any, numbers: Any, settings: Any, at: Any, result: Any
) -> None:  # pragma: no cover - compiled
    """Replace MLX's s and b by better ones, rounded, and mark the groups where it was done.

    Args:
        inputs: weights, flat; importance of their columns, [units · width], flat.
        shape: group size, width, rows of a unit.
        starts: shares of the way from the mean to the lower and upper end, [starts, 2].
        numbers: the largest code; how many bits of a float32's fraction the dtype of s and b
            drops; its largest value.
        settings: slack and magnitudes, see `search.Search`.
        at: `new_lanes()`.
        result: scales and biases, replaced; and whether they were, for each group.
    """
    n, dropped, limit = numbers
    scales, biases, better = result
    last = scales.size - 1
    w = np.empty(shape[0] * _LANES, np.float32)
    h = np.empty_like(w)
    for first in range(0, scales.size, _LANES):
        _load(inputs, shape, first, last, w, h)
        _survey(w, at)
        _load_grids(scales, biases, first, at)
        _start_from_mlx(w, h, numbers, settings, at)
        for i in range(len(starts)):
            _begin(starts[i, 0], starts[i, 1], n, at)
            for _ in range(STEPS):
                # Rounded before it is scored, so that what is scored is what will be stored.
                round_to(at.next_s, dropped)
                round_to(at.next_b, dropped)
                _accept(limit, at)
                _evaluate(w, h, n, (at.s, at.b), (at.s, at.b), at.sums)
                _keep_better(at)
                _refit(at)
        # The last lanes may repeat the last group.
        for lane in range(min(_LANES, scales.size - first)):
            if at.best_s[lane] != at.mlx_s[lane] or at.best_b[lane] != at.mlx_b[lane]:
                scales[first + lane], biases[first + lane] = at.best_s[lane], at.best_b[lane]
                better[first + lane] = True
