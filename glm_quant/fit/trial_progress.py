"""How far trials that pass the layers together have come, in steps that a person can wait for.

A pass reports whole layers, and a layer that sixty trials encode takes minutes. So a layer's share
grows with the values that were encoded in it.
"""

from collections import Counter
from collections.abc import Callable, Sequence

from glm_quant.model.groups import layer_of
from glm_quant.quantize.layout import PlannedWeight

# Steps of a layer, and of the comparison at the end, which counts as one more layer.
_STEPS = 1000


class TrialProgress:
    """Counts for one pass; `progress` never hears of less than it heard before."""

    def __init__(
        self,
        planned: Sequence[PlannedWeight],
        depth: int,
        progress: Callable[[int, int], None],
    ) -> None:
        """Begin.

        Args:
            planned: the quantized weights of all trials.
            depth: layers of the model.
            progress: called with steps done and steps to do.
        """
        self._values = Counter[int | None]()
        for one in planned:
            self._values[layer_of(one.weight.name)] += one.weight.params
        self._depth, self._progress = depth, progress
        self._layer, self._encoded = 0, 0

    def encoded(self, values: int) -> None:
        """Note values that were encoded in the layer at hand."""
        self._encoded += values
        expected = self._values[self._layer]
        if self._layer < self._depth and expected:
            self._report(min(self._encoded / expected, 1.0))

    def passed(self, layers: int, _depth: int) -> None:
        """Note how many layers are passed."""
        self._layer, self._encoded = layers, 0
        self._report(0.0)

    def compared(self, done: int, total: int) -> None:
        """Note how many of the trials are compared with the source."""
        self._layer = self._depth
        self._report(done / total)

    def _report(self, share: float) -> None:
        self._progress(int((self._layer + share) * _STEPS), (self._depth + 1) * _STEPS)
