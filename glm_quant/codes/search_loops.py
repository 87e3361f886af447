"""The compiled loops of `search`: the form that runs everywhere, and that all others must equal.

They hold 16 groups side by side, one a lane, and each lane adds up in the order of its weights. So
they are vectorized and yet the same IEEE operations in the same order on every machine: the bytes
do not depend on the width of their vectors. What a reader would get wrong: constants that a loop
uses must stand in this file, since a loop is compiled again only when its own file changes.
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

# What other forms are told of a group before its starts, in this order.
STATE = ("low", "high", "mean", "sum_h", "sum_hw", "s", "b", "best", "allowed")
# Where other forms may differ by subnormal numbers (`search_forms`).
SMALL, LARGE, SMALL_H, TINY = 2.0**-60, 2.0**60, 2.0**-40, 2.0**-100


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


def new_lanes() -> _Lanes:
    """Return room for what the loops know of the groups at hand."""
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
        if spread > np.float64(DECIDED) * total * square:
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
    round_to(at.best_s, dropped)
    round_to(at.best_b, dropped)
    _set_aside(w, at)
    _weigh(w, h, magnitudes, at)
    _evaluate(w, h, n, at.mlx_s, at.mlx_b, at.best_s, at.best_b, at.found)
    for lane in range(_LANES):
        at.best[lane] = at.found[lane]
        at.allowed[lane] = at.found[_LANES + lane] * slack
        at.mlx_s[lane], at.mlx_b[lane] = at.best_s[lane], at.best_b[lane]


@compiled
def _enter(
    source: Any,
    energy: Any,
    shape: Any,
    first: Any,
    w: Any,
    h: Any,
    form: Any,
    settings: Any,
    at: Any,
    result: Any,
) -> None:  # pragma: no cover - compiled
    """Take up 16 groups, up to the point where starts are tried."""
    scales, biases, _ = result
    last = scales.size - 1
    _load(source, energy, shape, first, last, w, h)
    _survey(w, at)
    for lane in range(_LANES):
        at.mlx_s[lane] = scales[min(first + lane, last)]
        at.mlx_b[lane] = biases[min(first + lane, last)]
    _start_from_mlx(w, h, form, settings, at)


@compiled
def search(
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
    for first in range(0, scales.size, _LANES):
        _enter(source, energy, shape, first, w, h, form, settings, at, result)
        for i in range(len(starts)):
            _begin(starts[i, 0], starts[i, 1], n, at)
            for _ in range(STEPS):
                round_to(at.next_s, dropped)
                round_to(at.next_b, dropped)
                _accept(limit, at)
                _evaluate(w, h, n, at.s, at.b, at.s, at.b, at.found)
                _keep_better(at)
                _refit(at)
        for lane in range(min(_LANES, scales.size - first)):
            if at.best_s[lane] != at.mlx_s[lane] or at.best_b[lane] != at.mlx_b[lane]:
                scales[first + lane], biases[first + lane] = at.best_s[lane], at.best_b[lane]
                better[first + lane] = True


@compiled
def _see_plain(w: Any, h: Any, ends: Any) -> None:  # pragma: no cover - compiled
    """Find each group's smallest weight that is not 0, and its smallest and largest importance."""
    zero, large = np.float32(0), np.float32(LARGE)
    for lane in range(_LANES):
        ends[0, lane] = ends[1, lane] = large
        ends[2, lane] = zero
    for j in range(w.size // _LANES):
        for lane in range(_LANES):
            size, weight = abs(w[j * _LANES + lane]), h[j * _LANES + lane]
            ends[0, lane] = min(ends[0, lane], large if size == zero else size)
            ends[1, lane] = min(ends[1, lane], weight)
            ends[2, lane] = max(ends[2, lane], weight)


@compiled
def _is_plain(lane: Any, ends: Any, at: Any) -> Any:  # pragma: no cover - compiled
    """Whether a group's numbers are far enough from the subnormal ones; see `search_forms`."""
    zero, small, large = np.float32(0), np.float32(SMALL), np.float32(LARGE)
    small_h, tiny = np.float32(SMALL_H), np.float32(TINY)
    s, b, mean = abs(at.mlx_s[lane]), abs(at.mlx_b[lane]), abs(at.mean[lane])
    plain = tiny <= at.best[lane] and tiny <= at.allowed[lane] and small <= s <= large
    plain = plain and (b == zero or small <= b <= large) and (mean == zero or mean >= small_h)
    return plain and ends[0, lane] >= small and small_h <= ends[1, lane] and ends[2, lane] <= large


@compiled
def prepare(
    source: Any,
    energy: Any,
    shape: Any,
    first: Any,
    form: Any,
    settings: Any,
    at: Any,
    result: Any,
    problem: Any,
) -> None:  # pragma: no cover - compiled
    """Do for groups from `first` on what `search` does before its starts, for another form.

    Fills importances, [groups, size], the state [groups, len(STATE)], and which groups are plain.
    """
    importances, state, plain = problem
    w = np.empty(shape[0] * _LANES, np.float32)
    h = np.empty_like(w)
    ends = np.empty((3, _LANES), np.float32)
    for g in range(0, len(state), _LANES):
        _enter(source, energy, shape, first + g, w, h, form, settings, at, result)
        _see_plain(w, h, ends)
        for lane in range(min(_LANES, len(state) - g)):
            row = state[g + lane]
            row[0], row[1], row[2] = at.low[lane], at.high[lane], at.mean[lane]
            row[3], row[4] = at.sum_h[lane], at.sum_hw[lane]
            row[5], row[6] = at.mlx_s[lane], at.mlx_b[lane]
            row[7], row[8] = at.best[lane], at.allowed[lane]
            plain[g + lane] = _is_plain(lane, ends, at)
            for j in range(shape[0]):
                importances[g + lane, j] = h[j * _LANES + lane]
