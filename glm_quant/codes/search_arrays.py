"""`search`'s starts as operations on MLX's arrays: the reference for kernels, on any device.

Each operation is one IEEE operation on each element, and a group's sums are made weight after
weight, so the bits are the loops'. What a reader would get wrong: `mx.compile` and `mx.sum` are
left out on purpose. The first may contract a product and a sum into one operation, the second adds
in an order of its own. The refit needs float64, which no GPU has in MLX, so numpy does it.
"""

from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.codes.search_forms import Problem, Tried, thread_stream
from glm_quant.codes.search_loops import (
    DECIDED,
    DROPPED_BY_F16,
    LARGE,
    SMALL,
    STATE,
    STEPS,
    TINY,
)

# Elements of one operation, weights · starts: 16 MB each.
_ELEMENTS = 1 << 22


class _Fit(NamedTuple):
    """What codes are worth, [groups, starts] each; see `search_loops._Lanes.found`."""

    error: mx.array
    most: mx.array
    linear: mx.array
    square: mx.array
    product: mx.array
    unsure: mx.array


def try_in_arrays(problem: Problem, device: mx.Device | None = None) -> Tried:
    """Try all starts; a `search_forms.Form`.

    Args:
        problem: groups and starts.
        device: where; None: the default device.
    """
    groups, size = problem.w.shape
    step = max(1, _ELEMENTS // (size * len(problem.starts)))
    with mx.stream(thread_stream(device or mx.default_device())):
        parts = [
            _try(
                problem._replace(
                    w=problem.w[first : first + step],
                    h=problem.h[first : first + step],
                    state=problem.state[first : first + step],
                )
            )
            for first in range(0, groups, step)
        ]
    return Tried(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))


def _try(problem: Problem) -> Tried:
    """Try all starts of some groups: arrays are [size, groups, starts] and [groups, starts]."""
    w, h = (mx.array(np.ascontiguousarray(a.T))[:, :, None] for a in (problem.w, problem.h))
    at = {name: mx.array(problem.state[:, i, None]) for i, name in enumerate(STATE)}
    low, high = (mx.array(problem.starts[None, :, i]) for i in range(2))
    bottom = at["mean"] - low * (at["mean"] - at["low"])
    top = at["mean"] + high * (at["high"] - at["mean"])
    next_s, next_b = (top - bottom) / float(problem.n), bottom
    s, b, best = (mx.broadcast_to(at[name], bottom.shape) for name in ("s", "b", "best"))
    best_s, best_b, unsure = s, b, mx.zeros(bottom.shape, mx.bool_)
    underflown = np.zeros(bottom.shape, np.bool_)
    for step in range(STEPS):
        new_s, new_b = (_stored(x, problem.dropped) for x in (next_s, next_b))
        limit = float(problem.limit)
        taken = (new_s != 0) & (mx.abs(new_s) <= limit) & (mx.abs(new_b) <= limit)
        s, b = mx.where(taken, new_s, s), mx.where(taken, new_b, b)
        fit = _evaluate(w, h, float(problem.n), s, b)
        better = (fit.error < best) & (fit.most <= at["allowed"])
        best = mx.where(better, fit.error, best)
        best_s, best_b = mx.where(better, s, best_s), mx.where(better, b, best_b)
        unsure = unsure | fit.unsure | ~_in_range(s) | ((b != 0) & ~_in_range(b))
        mx.eval(best, best_s, best_b, unsure, *fit)
        if step + 1 < STEPS:
            refit_s, refit_b, lost = _refit(fit, problem.state)
            next_s, next_b = mx.array(refit_s), mx.array(refit_b)
            underflown |= lost
    mx.eval(best, best_s, best_b, unsure)
    error, s_found, b_found = (np.array(array) for array in (best, best_s, best_b))
    refit = np.array(next_s), np.array(next_b)
    return Tried(error, s_found, b_found, *refit, np.array(unsure) | underflown)


def _stored(x: mx.array, dropped: int) -> mx.array:
    """Round to a dtype, halves to even, by its count of dropped bits."""
    if dropped == 0:
        return x
    pattern = mx.view(x, mx.uint32)
    below, mask = (1 << (dropped - 1)) - 1, 0xFFFFFFFF << dropped & 0xFFFFFFFF
    odd = (pattern >> mx.array(dropped, mx.uint32)) & mx.array(1, mx.uint32)
    moved = (pattern + mx.array(below, mx.uint32) + odd) & mx.array(mask, mx.uint32)
    nearest = mx.view(moved, mx.float32)
    if dropped != DROPPED_BY_F16:
        return nearest
    size = (mx.abs(x) + 0.5) - 0.5
    return mx.where(mx.abs(x) < 2.0**-14, mx.where(x < 0, -size, size), nearest)


def _evaluate(w: mx.array, h: mx.array, n: float, s: mx.array, b: mx.array) -> _Fit:
    """Find the nearest codes under each s and b, and what they are worth."""
    q = mx.minimum(mx.maximum(mx.round((w - b) / s), 0.0), n)
    d = w - (q * s + b)
    hq = h * q
    term, square, product = h * d * d, hq * q, hq * w
    unsure = mx.any((term < TINY) & (d != 0), axis=0)
    most = mx.max(mx.abs(d), axis=0)
    return _Fit(_sum(term), most, _sum(hq), _sum(square), _sum(product), unsure)


def _sum(terms: mx.array) -> mx.array:
    """Add up over the first axis, one after the other."""
    total = mx.zeros(terms.shape[1:], mx.float32)
    for j in range(terms.shape[0]):
        total = total + terms[j]
    return total


def _in_range(x: mx.array) -> mx.array:
    return (mx.abs(x) >= SMALL) & (mx.abs(x) <= LARGE)


def _refit(
    fit: _Fit, state: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Find the least-squares s and b for the codes; s is 0 where they do not decide it."""
    total, x = (state[:, STATE.index(name), None].astype(float) for name in ("sum_h", "sum_hw"))
    linear, square, y = (np.array(a).astype(float) for a in (fit.linear, fit.square, fit.product))
    with np.errstate(all="ignore"):
        spread = total * square - linear * linear
        scale = (total * y - x * linear) / spread
        bias = (x - scale * linear) / total
        decided = spread > DECIDED * total * square
        s, b = (np.where(decided, a, 0).astype(np.float32) for a in (scale, bias))
        lost = decided & (((s == 0) & (scale != 0)) | ((b == 0) & (bias != 0)))
    return s, b, lost
