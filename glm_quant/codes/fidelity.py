"""How near stored codes are to their weights: every quantized block is dequantized and compared.

The loop reads packed codes, scales and biases as a runtime does and shares no line with the one
that made them, so a wrong packing, axis or scale shows. The relative error sqrt(Σ(ŵ - w)² / Σw²)
of any real weight lies in a narrow band that its bits decide; outside of it something is broken. Of
large blocks every thirteenth group is looked at: all of them would cost as much as quantizing.
"""

import math
from dataclasses import dataclass
from functools import cache
from itertools import zip_longest
from typing import Any, Self

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.reader import as_array
from glm_quant.codes.affine import Bits, to_float32
from glm_quant.codes.scheme import Quantized
from glm_quant.compiled import compiled
from glm_quant.errors import WeightError

BINS = 16
# Prime, so that over the rows every column comes up. Blocks of few groups are looked at whole.
_STRIDE = 13
_FEW_GROUPS = 8192

# The largest relative error of any real weight. Normal weights have 0.39, 0.19, 0.09, 0.044, 0.022
# and 0.007 under `minmax` with groups of 64 (measured), Student-t ones with 5 degrees of freedom
# 0.48 in 2 bits, heavier tails more. Codes of something else have 1 and above.
_LARGEST = {2: 0.8, 3: 0.5, 4: 0.3, 5: 0.2, 6: 0.1, 8: 0.05}
# Fewer elements than this are no statistic.
_ENOUGH = 4096


@dataclass(frozen=True, slots=True)
class Fidelity:
    """Sums over the elements of a weight that were looked at.

    Attributes:
        count: how many.
        error_energy: Σ(ŵ - w)².
        weight_energy: Σw².
        largest_error: max |ŵ - w|.
        histogram: how often each code occurs; codes of more than 4 bits are folded into 16 bins.
    """

    count: int
    error_energy: float
    weight_energy: float
    largest_error: float
    histogram: tuple[int, ...] = ()

    @classmethod
    def of(cls, *fields: Any) -> Self:
        """Make one from JSON's types."""
        count, error, weight, largest, histogram = fields
        return cls(int(count), float(error), float(weight), float(largest), tuple(histogram))

    @property
    def relative_error(self) -> float:
        """sqrt(Σ(ŵ - w)² / Σw²); zero for zero weights that are stored exactly."""
        if self.weight_energy == 0:
            return 0.0 if self.error_energy == 0 else math.inf
        return math.sqrt(self.error_energy / self.weight_energy)

    def __add__(self, block: "Fidelity") -> "Fidelity":
        """Return the sums over both."""
        return Fidelity(
            self.count + block.count,
            self.error_energy + block.error_energy,
            self.weight_energy + block.weight_energy,
            max(self.largest_error, block.largest_error),
            tuple(map(sum, zip_longest(self.histogram, block.histogram, fillvalue=0))),
        )

    def check(self, scheme: Quantized, where: str) -> None:
        """Hold the error against the band of its bits.

        Raises:
            WeightError: it is too large for any real weight.
        """
        bound = _LARGEST[scheme.bits] * math.sqrt(scheme.group_size / 64)
        if self.count >= _ENOUGH and self.relative_error > min(bound, 0.9):
            raise WeightError(
                f"{where}: stored as {scheme.describe()} its relative error is "
                f"{self.relative_error:.3f}, real weights stay below {min(bound, 0.9):.2f}. Look "
                "at the source tensor: its values are not those of a weight. If they are right, "
                "give it more bits or a `dtype` in the recipe."
            )


def measure(weights: Bits, dtype: str, scheme: Quantized, stored: list[NDArray[Any]]) -> Fidelity:
    """Dequantize a block and compare it with the weights.

    Args:
        weights: [rows, width] as the bits of `dtype`.
        dtype: "BF16", "F16" or "F32".
        scheme: what the block was stored as.
        stored: its tensors, as `encode` made them.
    """
    if scheme.mode != "affine":
        return _measure_with_mlx(weights, dtype, scheme, stored)
    codes, scales, biases = stored
    if dtype == "BF16":
        source, shift = weights.reshape(-1), 16
    else:
        source, shift = to_float32(weights, dtype).view(np.uint32).reshape(-1), 0
    histogram = np.zeros(min(1 << scheme.bits, BINS), np.int64)
    stride = 1 if scales.size <= _FEW_GROUPS else _STRIDE
    error, weight, largest = _loop(scheme.bits, scheme.group_size, shift)(
        source,
        stride,
        codes.reshape(-1),
        to_float32(scales.reshape(-1), dtype),
        to_float32(biases.reshape(-1), dtype),
        histogram,
    )
    return Fidelity(int(histogram.sum()), error, weight, largest, tuple(histogram.tolist()))


def _measure_with_mlx(
    weights: Bits, dtype: str, scheme: Quantized, stored: list[NDArray[Any]]
) -> Fidelity:
    codes, scales = (mx.array(array.reshape(weights.shape[0], -1)) for array in stored)
    with mx.stream(mx.cpu):
        read = mx.dequantize(
            codes,
            scales,
            group_size=scheme.group_size,
            bits=scheme.bits,
            mode=scheme.mode,
            dtype=mx.float32,
        )
        source = as_array(np.ascontiguousarray(weights).data, dtype, weights.shape)
        wide = source.astype(mx.float32)
        error = mx.abs(read - wide)
        sums = (mx.sum(error * error), mx.sum(wide * wide), mx.max(error))
        mx.eval(sums)
    return Fidelity.of(weights.size, *(value.item() for value in sums), ())


@compiled
def _unpack(codes: Any, bits: Any, word: Any, values: Any) -> None:  # pragma: no cover - compiled
    """Read a group's codes from the words of `codes` from `word` on, as numbers.

    Callers give a constant number of bits; then this unrolls and vectorizes.
    """
    mask = np.uint32((1 << bits) - 1)
    if 32 % bits == 0:
        per_word = 32 // bits
        for k in range(values.size // per_word):
            packed = codes[word + k]
            for i in range(per_word):
                code = (packed >> np.uint32(i * bits)) & mask
                values[k * per_word + i] = np.float32(np.int32(code))
    else:
        for j in range(values.size):
            bit = j * bits
            low = np.uint64(codes[word + bit // 32]) >> np.uint64(bit % 32)
            if bit % 32 + bits > 32:
                low |= np.uint64(codes[word + bit // 32 + 1]) << np.uint64(32 - bit % 32)
            values[j] = np.float32(np.int32(np.uint32(low) & mask))


@cache
def _loop(bits: int, group_size: int, shift: int) -> Any:
    """Compile the loop for a scheme."""
    fold = np.uint32(max(0, bits - 4))
    words = group_size * bits // 32

    def loop(  # pragma: no cover - compiled
        source: Any, stride: Any, codes: Any, scales: Any, biases: Any, histogram: Any
    ) -> Any:
        values = np.empty(group_size, np.float32)
        group = np.empty(group_size, np.float32)
        pattern = group.view(np.uint32)
        error_energy, weight_energy, largest = 0.0, 0.0, np.float32(0)
        for g in range(0, scales.size, stride):
            first = g * group_size
            _unpack(codes, bits, g * words, values)
            for j in range(group_size):
                pattern[j] = np.uint32(source[first + j]) << np.uint32(shift)
            scale, bias = scales[g], biases[g]
            # A group's sums in float32 vectorize; those of a weight need float64.
            error, weight, most = np.float32(0), np.float32(0), np.float32(0)
            for j in range(group_size):
                d = scale * values[j] + bias - group[j]
                error += d * d
                weight += group[j] * group[j]
                most = max(most, abs(d))
            error_energy += error
            weight_energy += weight
            largest = max(largest, most)
            for j in range(group_size):
                histogram[np.uint32(np.int32(values[j])) >> fold] += 1
        return error_energy, weight_energy, largest

    return compiled(loop)
