"""A group of columns in `gptq`: its codes, and the scale and bias that cost the output least.

Errors of a group are spread (`gptq`) as e = (w - ŵ)·U⁻¹ among the group's columns, and Σe² is what
the layer's output loses in the end, however well later columns make up for it. With a = w·U⁻¹ and
o = 1·U⁻¹, what the codes stand for is y = a - e, and other scales and biases for the same codes are
αy + βo. So from each of several grids, steps alternate between the codes that `gptq` chooses and
the α and β that minimize

    Σe² + G·(Σe·a)² / Σa²

Without the second term Σe² falls further, and KL rises: least squares shrink what they fit, in all
rows alike, so the layer's output shrinks, which is what Σe·a measures. The best grid is kept, the
one to begin with among them, scored as it is stored.
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
        weights: with the errors of the groups before spread over them.
        factor: U among the columns.
        codes: those that were chosen last.
    """

    def __init__(self, weights: Floats, factor: Floats, n: np.float32) -> None:
        """Prepare; `weights` is [rows, columns], `n` the largest code."""
        self.weights, self.factor = np.ascontiguousarray(weights.T), np.ascontiguousarray(factor)
        self.codes = np.empty_like(self.weights)
        self._n = n

    def choose(self, grid: Grid) -> Floats:
        """Choose codes under a scale and bias for each row; returns the errors to spread."""
        errors = np.empty_like(self.weights)
        _choose(self.weights.copy(), grid, self._n, self.factor, self.codes, errors)
        return errors

    def refine(self, grid: Grid, dtype: str) -> Grid:
        """Return the scale and bias of each row, values of their dtype.

        Args:
            grid: scale and bias to begin with, [rows] each.
            dtype: of scales and biases.
        """
        image = _divided(self.weights, self.factor)
        unit = _divided(np.ones((len(image), 1), np.float32), self.factor)
        aa, _, ao = _sums(image, image, unit)
        oo = float(_sums(unit, unit, unit)[0, 0])
        weight = _GAIN / np.maximum(aa, np.finfo(np.float64).tiny)
        best, least = grid, np.full(self.weights.shape[1], np.inf)
        for width in _WIDTHS:
            trial = _widened(grid, self._n, np.float32(width), dtype)
            for _ in range(_STEPS + 1):
                ee, ea, eo = _sums(self.choose(trial), image, unit)
                cost = ee + weight * ea * ea
                better = cost < least
                least = np.where(better, cost, least)
                best = np.where(better, trial[0], best[0]), np.where(better, trial[1], best[1])
                # Normal equations of α and β.
                ya, yo, yy = aa - ea, ao - eo, aa - 2 * ea + ee
                both = yo + weight * ya * ao
                first, second = yy + weight * ya * ya, oo + weight * ao * ao
                spread = first * second - both * both
                # Codes that are nearly all alike do not decide them; such rows keep their grid.
                decided = spread > 1e-6 * first * second
                share = (1 + weight * aa) / np.where(decided, spread, 1)
                alpha = np.where(decided, share * (ya * second - ao * both), 1)
                beta = np.where(decided, share * (ao * first - ya * both), 0)
                trial = _accepted((alpha * trial[0], alpha * trial[1] + beta), trial, dtype)
        return best


def _widened(grid: Grid, n: np.float32, width: np.float32, dtype: str) -> Grid:
    """Return a grid of another width about the same middle."""
    s, b = grid
    middle = b + s * (n / 2)
    return _accepted((s * width, middle - s * width * (n / 2)), grid, dtype)


def _accepted(grid: tuple[Any, Any], default: Grid, dtype: str) -> Grid:
    """Return a grid rounded to its dtype, and the default where that does not hold it."""
    fits = (abs(grid[0]) <= LIMIT[dtype]) & (abs(grid[1]) <= LIMIT[dtype])
    s, b = (
        to_float32(from_float32(np.where(fits, values, 0).astype(np.float32), dtype), dtype)
        for values in grid
    )
    # A scale may round to 0 only now.
    fits &= s != 0
    return np.where(fits, s, default[0]), np.where(fits, b, default[1])


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
    weights: Any, grid: Any, n: Any, factor: Any, codes: Any, errors: Any
) -> None:  # pragma: no cover - compiled
    """Fill `codes` and `errors`, column by column; `weights` is used up."""
    scales, biases = grid
    zero = np.float32(0)
    for j in range(weights.shape[0]):
        w, q, e, u = weights[j], codes[j], errors[j], factor[j]
        for row in range(w.size):
            s, b = scales[row], biases[row]
            code = min(max(np.rint((w[row] - b) / s), zero), n) if s != zero else zero
            q[row] = code
            e[row] = (w[row] - (code * s + b)) / u[j]
        for k in range(j + 1, weights.shape[0]):
            later, share = weights[k], u[k]
            for row in range(later.size):
                later[row] -= e[row] * share
