"""The best choice for every part within any budget: a multiple-choice knapsack, solved exactly.

Parts are merged one by one into a front of (bytes, cost): the sums that no other sum beats in both
(Nemhauser and Ullmann, 1969). A front that outgrows memory is
thinned, and then the answer is no longer the optimum but within a stated factor of it; sizes stay
exact, so no budget is ever exceeded.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# A front with more points is thinned: of two whose costs differ by less than this, one stays.
_MOST_POINTS = 1 << 18
_THINNING = 1e-4


@dataclass(frozen=True)
class Option:
    """One way to store a part: its size and what it costs in quality, 0 or more."""

    size_bytes: int
    cost: float


@dataclass(frozen=True)
class Point:
    """One choice for all parts: an option's number for each, and their sums."""

    picks: tuple[int, ...]
    size_bytes: int
    cost: float


class Front:
    """All choices that no other choice beats in both size and cost, smallest first.

    Attributes:
        sizes: bytes of each, [points], rising.
        costs: of each, [points], falling.
        slack: no cost is above this factor times the least that its size allows; 1 is exact.
    """

    def __init__(self, parts: Sequence[Sequence[Option]]) -> None:
        """Merge all parts.

        Args:
            parts: the options of each; at least one each.
        """
        self.sizes: NDArray[np.int64] = np.zeros(1, np.int64)
        self.costs: NDArray[np.float64] = np.zeros(1)
        self.slack = 1.0
        # Of each merge: for each point the point before it, and the option that was added.
        self._steps: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        for options in parts:
            self._merge(options)

    def best(self, budget_bytes: int) -> Point | None:
        """Return the choice of least cost within a budget; None where all are above it."""
        count = int(np.searchsorted(self.sizes, budget_bytes, "right"))
        return self.point(count - 1) if count else None

    def point(self, number: int) -> Point:
        """Return one choice of the front."""
        picks: list[int] = []
        at = number
        for before, added in reversed(self._steps):
            picks.append(int(added[at]))
            at = int(before[at])
        return Point(tuple(reversed(picks)), int(self.sizes[number]), float(self.costs[number]))

    def spread(self, count: int) -> list[Point]:
        """Return at most so many points at even steps of size, ends included."""
        wanted = np.linspace(self.sizes[0], self.sizes[-1], count)
        numbers = np.searchsorted(self.sizes, wanted, "right") - 1
        return [self.point(int(number)) for number in np.unique(numbers)]

    def _merge(self, options: Sequence[Option]) -> None:
        size = np.array([option.size_bytes for option in options], np.int64)
        cost = np.array([option.cost for option in options])
        sizes = (self.sizes[:, None] + size).reshape(-1)
        costs = (self.costs[:, None] + cost).reshape(-1)
        order = np.lexsort((costs, sizes))
        least = np.minimum.accumulate(costs[order])
        keep = order[np.concatenate([[True], costs[order][1:] < least[:-1]])]
        if len(keep) > _MOST_POINTS:
            keep = keep[_thinned(costs[keep])]
            self.slack *= 1 + _THINNING
        self.sizes, self.costs = sizes[keep], costs[keep]
        self._steps.append((keep // len(options), keep % len(options)))


def _thinned(falling: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the numbers of points that stay: each is lower than the last that stayed by a share.

    What goes has a smaller one before it that costs at most 1 + `_THINNING` times as much.
    """
    least = max(float(falling[-1]), float(falling[0]) * 1e-12)
    steps = np.floor(np.log(np.maximum(falling, least) / least) / np.log1p(_THINNING))
    return np.flatnonzero(np.concatenate([[True], steps[1:] != steps[:-1]]))
