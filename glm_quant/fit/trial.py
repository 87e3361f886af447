"""A source with some of its weights as a build would have them, without making the build.

Weights are encoded when they are needed and expanded to the float32 values that their codes stand
for, by the engine's own `encode`, so a trial has the values of the build that it speaks of.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.reader import Checkpoint, as_array
from glm_quant.codes.affine import from_float32
from glm_quant.codes.encode import Rows, encode
from glm_quant.codes.scheme import Quantized
from glm_quant.quantize.layout import PlannedWeight
from glm_quant.streaming.weights import PROJECTIONS, SourceWeights


class TrialWeights(SourceWeights):
    """The source's weights, but for those that are planned otherwise."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        planned: Mapping[str, PlannedWeight],
        encoded: Callable[[int], None] | None = None,
    ) -> None:
        """Read the config; no weight yet.

        Args:
            checkpoint: the source.
            planned: quantized weights by MLX module path; all others are the source's.
            encoded: called with the number of values that were encoded.
        """
        super().__init__(checkpoint)
        self._encoded = encoded or (lambda _: None)
        self._planned = planned

    def values(self, prefix: str, names: Sequence[str]) -> Mapping[str, mx.array]:
        """Return parameters, the planned ones as their codes have them."""
        return {
            name: self._stored(f"{prefix}{name}".rpartition(".")[0], value)
            for name, value in super().values(prefix, names).items()
        }

    def rows(self, path: str, first: int, count: int) -> mx.array:
        """Return rows of a matrix."""
        return self._stored(path, super().rows(path, first, count), first)

    def experts(self, layer: int, numbers: Sequence[int]) -> Iterator[tuple[int, list[mx.array]]]:
        """Yield (expert, [gate, up, down]) in the order of `numbers`; each [out, in]."""
        for expert, matrices in super().experts(layer, numbers):
            yield expert, self.variant_expert(layer, expert, matrices)

    def variant_layer(self, index: int, layer: Any) -> Any:
        """Return a layer with what is planned of it, or the source's where nothing is."""
        prefix = f"model.layers.{index}."
        own = (path for path in self._planned if path.startswith(prefix))
        return self.layer(index) if any(".switch_mlp." not in path for path in own) else layer

    def variant_expert(
        self, layer: int, expert: int, matrices: Sequence[mx.array]
    ) -> list[mx.array]:
        """Return [gate, up, down] of an expert, given the source's."""
        path = f"model.layers.{layer}.mlp.switch_mlp"
        return [
            self._stored(f"{path}.{name}", matrix, expert * matrix.shape[0])
            for name, matrix in zip(PROJECTIONS, matrices, strict=True)
        ]

    def _stored(self, path: str, values: mx.array, first_row: int = 0) -> mx.array:
        planned = self._planned.get(path)
        if planned is None:
            return values
        flat = np.array(values).reshape(-1, values.shape[-1])
        stored = mx.array(expanded(planned, flat, first_row)).reshape(values.shape)
        self._encoded(flat.size)
        return stored


def expanded(
    planned: PlannedWeight, rows: NDArray[np.float32], first_row: int
) -> NDArray[np.float32]:
    """Encode rows of a weight and return the values that the codes stand for.

    Args:
        planned: an affine scheme, and what else decides the codes.
        rows: [rows, width], values of the source's dtype.
        first_row: where they begin in the weight, seen as a matrix.

    Raises:
        WeightError: a scale would be infinite.
    """
    scheme, dtype = planned.scheme, planned.weight.source_dtype
    if not isinstance(scheme, Quantized):
        raise TypeError(f"{planned.weight.name}: {scheme.describe()} is no quantized scheme")
    bits = from_float32(np.ascontiguousarray(rows), dtype)
    factor = planned.factor.load() if planned.factor is not None else None

    def codes(piece: slice) -> list[NDArray[Any]]:
        importance = None
        if planned.importance is not None:
            first, count = first_row + piece.start, piece.stop - piece.start
            importance = planned.importance.of_rows(first, count, planned.weight.rows)
        return encode(Rows(bits[piece], dtype), scheme, planned.weight.name, importance, factor)

    pieces = _threads().map(codes, _pieces(planned, first_row, len(rows)))
    made, scales, biases = map(np.concatenate, zip(*pieces, strict=True))
    return np.array(
        mx.dequantize(
            mx.array(made),
            *(as_array(a.data, dtype, a.shape).astype(mx.float32) for a in (scales, biases)),
            group_size=scheme.group_size,
            bits=scheme.bits,
        )
    )


# Rows that a thread encodes at a time.
_ROWS = 256


def _pieces(planned: PlannedWeight, first_row: int, count: int) -> Iterator[slice]:
    """Yield pieces of some rows of a weight, each within one unit of its importance."""
    unit = planned.weight.rows // (planned.importance.units if planned.importance else 1)
    begin = 0
    while begin < count:
        left = unit - (first_row + begin) % unit
        end = min(begin + min(_ROWS, left), count)
        yield slice(begin, end)
        begin = end


@cache
def _threads() -> ThreadPoolExecutor:
    """Return the threads that encode: nothing but compiled loops runs in them."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="trial")
