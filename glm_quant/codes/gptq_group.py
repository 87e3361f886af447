"""A group of columns in `gptq`: its codes, and the scale and bias that cost the output least.

Errors of a group are spread (`gptq`) as e = (w - ŵ)·U⁻¹ among the group's columns, and Σe² is what
the layer's output loses in the end, however well later columns make up for it. With a = w·U⁻¹ and
o = 1·U⁻¹, what the codes stand for is y = a - e, and other scales and biases for the same codes are
αy + βo. So from each of several grids, steps alternate between the codes that `gptq` chooses and
the α and β that make least

    Σe² + G·(Σe·a)² / Σa²

What a reader would get wrong: without the second term Σe² falls further, and KL rises. Least
squares shrink what they fit, in all rows alike, so the layer's output shrinks; that is what Σe·a
measures. The best grid of all is kept, the one to begin with among them, scored as it is stored.
Sums are made in order, in float64: the bytes are the same on every machine.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_quant.codes.affine import from_float32, to_float32
from glm_quant.codes.search_loops import LIMIT
from glm_quant.compiled import compiled

Floats = NDArray[np.float32]
Grid = tuple[Floats, Floats]

# G above.
_GAIN = 2.0
# Grids to begin with: the given one, and others as wide as this share of it, about its middle.
_WIDTHS = (1.0, 0.85, 1.15)
# Steps from each.
_STEPS = 3


class Group:
    """A group's columns in some rows, [columns, rows]: rows lie side by side, one a lane.

    Attributes:
        left: weights as they are by now.
        factor: U among the columns.
        codes: that were chosen last.
    """

    def __init__(self, left: Floats, factor: Floats, n: np.float32) -> None:
        """Prepare; `left` is [rows, columns], `n` the largest code."""
        self.left, self.factor = np.ascontiguousarray(left.T), np.ascontiguousarray(factor)
        self.codes = np.empty_like(self.left)
        self._n = n

    def choose(self, grid: Grid) -> Floats:
        """Choose codes under a scale and bias for each row; returns the errors to spread."""
        errors = np.empty_like(self.left)
        _choose(self.left.copy(), grid, self._n, self.factor, self.codes, errors)
        return errors

    def refine(self, grid: Grid, dtype: str) -> Grid:
        """Return the scale and bias of each row, values of their dtype.

        Args:
            grid: scale and bias to begin with, [rows] each.
            dtype: of scales and biases.
        """
        image = _divided(self.left, self.factor)
        unit = _divided(np.ones((len(image), 1), np.float32), self.factor)
        aa, _, ao = _sums(image, image, unit)
        oo = float(_sums(unit, unit, unit)[0, 0])
        weight = _GAIN / np.maximum(aa, np.finfo(np.float64).tiny)
        best, least = grid, np.full(self.left.shape[1], np.inf)
        for width in _WIDTHS:
            now = _widened(grid, self._n, np.float32(width), dtype)
            for _ in range(_STEPS + 1):
                ee, ea, eo = _sums(self.choose(now), image, unit)
                cost = ee + weight * ea * ea
                better = cost < least
                least = np.where(better, cost, least)
                best = np.where(better, now[0], best[0]), np.where(better, now[1], best[1])
                # Normal equations of α and β.
                ya, yo, yy = aa - ea, ao - eo, aa - 2 * ea + ee
                both = yo + weight * ya * ao
                first, second = yy + weight * ya * ya, oo + weight * ao * ao
                spread = first * second - both * both
                known = spread > 1e-6 * first * second
                share = (1 + weight * aa) / np.where(known, spread, 1)
                alpha = np.where(known, share * (ya * second - ao * both), 1)
                beta = np.where(known, share * (ao * first - ya * both), 0)
                now = _accepted((alpha * now[0], alpha * now[1] + beta), now, dtype)
        return best


def _widened(grid: Grid, n: np.float32, width: np.float32, dtype: str) -> Grid:
    """Return a grid of another width about the same middle."""
    s, b = grid
    middle = b + s * (n / 2)
    return _accepted((s * width, middle - s * width * (n / 2)), grid, dtype)


def _accepted(wanted: tuple[Any, Any], else_: Grid, dtype: str) -> Grid:
    """Return a grid rounded to its dtype, where that holds it."""
    fits = (abs(wanted[0]) <= LIMIT[dtype]) & (abs(wanted[1]) <= LIMIT[dtype])
    s, b = (
        to_float32(from_float32(np.where(fits, one, 0).astype(np.float32), dtype), dtype)
        for one in wanted
    )
    fits &= s != 0
    return np.where(fits, s, else_[0]), np.where(fits, b, else_[1])


def _sums(errors: Floats, image: Floats, unit: Floats) -> NDArray[np.float64]:
    """Return Σe², Σe·a and Σe·o over the columns, [3, rows]."""
    sums = np.zeros((3, errors.shape[1]))
    _add_products(errors, image, unit, sums)
    return sums


def _divided(x: Floats, factor: Floats) -> Floats:
    """Return x·U⁻¹."""
    out = np.empty_like(x)
    _divide(x.copy(), factor, out)
    return out


@compiled
def _add_products(
    errors: Any, image: Any, unit: Any, sums: Any
) -> None:  # pragma: no cover - compiled
    squares, along, shift = sums[0], sums[1], sums[2]
    for j in range(errors.shape[0]):
        e, a, o = errors[j], image[j], np.float64(unit[j, 0])
        for row in range(e.size):
            x = np.float64(e[row])
            squares[row] += x * x
            along[row] += x * np.float64(a[row])
            shift[row] += x * o


@compiled
def _divide(x: Any, factor: Any, out: Any) -> None:  # pragma: no cover - compiled
    """Solve out·U = x for rows that lie side by side; x is used up."""
    for j in range(x.shape[0]):
        y, u = out[j], factor[j]
        for row in range(y.size):
            y[row] = x[j, row] / u[j]
        for k in range(j + 1, x.shape[0]):
            later, share = x[k], u[k]
            for row in range(y.size):
                later[row] -= y[row] * share


@compiled
def _choose(
    left: Any, grid: Any, n: Any, factor: Any, codes: Any, errors: Any
) -> None:  # pragma: no cover - compiled
    """Fill `codes` and `errors`, column by column; what is left of the weights is used up."""
    scales, biases = grid
    zero = np.float32(0)
    for j in range(left.shape[0]):
        w, q, e, u = left[j], codes[j], errors[j], factor[j]
        for row in range(w.size):
            s, b = scales[row], biases[row]
            code = min(max(np.rint((w[row] - b) / s), zero), n) if s != zero else zero
            q[row] = code
            e[row] = (w[row] - (code * s + b)) / u[j]
        for k in range(j + 1, left.shape[0]):
            later, share = left[k], u[k]
            for row in range(later.size):
                later[row] -= e[row] * share
