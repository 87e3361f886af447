"""`minmax`: MLX's affine quantizer, as our own compiled loop.

For a group of weights w with B bits, n = 2ᴮ - 1 (mx.quantize, backend/cpu/quantized.cpp):

    Δ = max((max w - min w) / n, 1e-7)
    the end of larger magnitude is the edge; s = Δ if that is the minimum, else -Δ
    q₀ = round(edge / s);   if q₀ ≠ 0: s = edge / q₀, b = edge   else b = 0
    code = clip(round((w - b) / s), 0, n)

so the edge and zero are represented exactly. Codes come from s and b in float32, which are rounded
to the weight's dtype only to be stored.

mx.quantize itself is not the same everywhere: its GPU kernels start the maximum at 0 and round
halves away from zero; its CPU kernel, and this loop, start at the first value and round halves to
even. Every operation here is one IEEE 754 float32 operation (no fused multiply-add, no reciprocal),
so all machines give the same bytes.
"""

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_quant.compiled import compiled

Bits = NDArray[np.uint16 | np.uint32]


def quantize_affine(
    weights: Bits, dtype: str, bits: int, group_size: int
) -> tuple[NDArray[np.uint32], Bits, Bits]:
    """Quantize rows of weights.

    Args:
        weights: [rows, width], finite values as the bits of their dtype.
        dtype: "BF16", "F16" or "F32".
        bits: 2, 3, 4, 5, 6 or 8.
        group_size: divides width.

    Returns:
        codes [rows, width · bits / 32], scales and biases [rows, width / group_size], the latter
        two as the bits of `dtype`. Codes fill each row as one little-endian stream of bits.
    """
    codes, scales, biases = quantize_unrounded(weights, dtype, bits, group_size)
    return codes, from_float32(scales, dtype), from_float32(biases, dtype)


def quantize_unrounded(
    weights: Bits, dtype: str, bits: int, group_size: int
) -> tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]:
    """Quantize rows as `quantize_affine` does; scales and biases are those the codes came from."""
    rows, width = weights.shape
    codes = np.empty((rows, width * bits // 32), np.uint32)
    scales = np.empty((rows, width // group_size), np.float32)
    biases = np.empty_like(scales)
    if dtype == "BF16":
        # The loop shifts them itself: a float32 copy of the block would cost more than the loop.
        source, shift = weights.reshape(-1), 16
    else:
        source, shift = to_float32(weights, dtype).view(np.uint32).reshape(-1), 0
    loop = _loop(bits, group_size, shift)
    loop(source, codes.reshape(-1), scales.reshape(-1), biases.reshape(-1))
    return codes, scales, biases


def to_float32(bits: Bits, dtype: str) -> NDArray[np.float32]:
    """Return the values whose bits are given, exactly."""
    if dtype == "BF16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view(np.float16 if dtype == "F16" else np.float32).astype(np.float32)


def from_float32(values: NDArray[np.float32], dtype: str) -> Bits:
    """Return the bits of values rounded to a dtype, halves to even."""
    if dtype == "F32":
        return values.view(np.uint32)
    if dtype == "F16":
        return values.astype(np.float16).view(np.uint16)
    wide = values.view(np.uint32)
    # Adds half a unit of the last place kept, less one where that place is even.
    odd = (wide >> np.uint32(16)) & np.uint32(1)
    return ((wide + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)


def largest_magnitude(bits: Bits) -> int:
    """Return the largest of the bits without their sign: from infinity's on, it is Inf or NaN."""
    sign = 0x7FFF if bits.dtype == np.uint16 else 0x7FFFFFFF
    return int(_largest(bits.reshape(-1), bits.dtype.type(sign)))


_LANES = 64


@compiled
def _largest(bits: Any, no_sign: Any) -> Any:  # pragma: no cover - compiled
    # One running maximum for each lane: a single one of 16 bits is not vectorized.
    lanes = np.zeros(_LANES, bits.dtype)
    whole = bits.size // _LANES * _LANES
    for first in range(0, whole, _LANES):
        for i in range(_LANES):
            value = bits[first + i] & no_sign
            lanes[i] = value if value > lanes[i] else lanes[i]
    most = lanes.max()
    for i in range(whole, bits.size):
        most = max(most, bits[i] & no_sign)
    return most


@compiled
def _pack(codes: Any, bits: Any, out: Any, word: Any) -> None:  # pragma: no cover - compiled
    """Write a group's codes as a stream of bits to the words of `out` from `word` on.

    Callers give a constant number of bits; then this unrolls and vectorizes.
    """
    if 32 % bits == 0:
        per_word = 32 // bits
        for k in range(codes.size // per_word):
            packed = np.uint32(0)
            for i in range(per_word):
                packed |= codes[k * per_word + i] << np.uint32(i * bits)
            out[word + k] = packed
    else:
        stream = np.uint64(0)
        filled = 0
        for j in range(codes.size):
            stream |= np.uint64(codes[j]) << np.uint64(filled)
            filled += bits
            if filled >= 32:
                out[word] = np.uint32(stream & np.uint64(0xFFFFFFFF))
                stream >>= np.uint64(32)
                filled -= 32
                word += 1


@compiled
def _grid(low: Any, high: Any, n: Any) -> Any:  # pragma: no cover - compiled
    """Return scale and bias of a group from its ends."""
    from_low = abs(low) > abs(high)
    scale = max((high - low) / n, np.float32(1e-7))
    if not from_low:
        scale = -scale
    edge = low if from_low else high
    at_zero = np.rint(edge / scale)
    bias = np.float32(0)
    if at_zero != bias:
        # Adjusted so that zero has a code of its own.
        scale = edge / at_zero
        bias = edge
    return scale, bias


@cache
def _loop(bits: int, group_size: int, shift: int) -> Any:
    """Compile the loop for a scheme.

    The ends of a group are looked for among integers that order as the values do: LLVM makes a
    minimum of vectors only of integers, and that of floats took two thirds of the time.
    """
    n, zero = np.float32((1 << bits) - 1), np.float32(0)
    shift_bits, sign, magnitude = np.int32(shift), np.int32(31), np.int32(0x7FFFFFFF)
    least = np.int32(-0x80000000)
    words = group_size * bits // 32

    def loop(  # pragma: no cover - compiled
        source: Any, out: Any, scales: Any, biases: Any
    ) -> None:
        group = np.empty(group_size, np.float32)
        pattern = group.view(np.int32)
        codes = np.empty(group_size, np.uint32)
        ends = np.empty(2, np.int32)
        values = ends.view(np.float32)
        for g in range(scales.size):
            first = g * group_size
            lowest, highest = magnitude, least
            for j in range(group_size):
                value = np.int32(np.int32(source[first + j]) << shift_bits)
                pattern[j] = value
                # Negative floats order the other way round than their bits.
                ordered = np.int32(value ^ ((value >> sign) & magnitude))
                lowest = min(lowest, ordered)
                highest = max(highest, ordered)
            ends[0] = lowest ^ ((lowest >> sign) & magnitude)
            ends[1] = highest ^ ((highest >> sign) & magnitude)
            scale, bias = _grid(values[0], values[1], n)
            for j in range(group_size):
                code = np.rint((group[j] - bias) / scale)
                codes[j] = np.uint32(np.int32(min(max(code, zero), n)))
            _pack(codes, bits, out, g * words)
            scales[g] = scale
            biases[g] = bias

    return compiled(loop)


@cache
def recoder(bits: int) -> Any:
    """Compile recode: the nearest codes of chosen groups under other scales and biases.

    Its arguments: weights in float32, scales, biases, which groups, and the words of codes.
    """
    n, zero = np.float32((1 << bits) - 1), np.float32(0)

    def recode(  # pragma: no cover - compiled
        source: Any, scales: Any, biases: Any, chosen: Any, words: Any
    ) -> None:
        size = source.size // scales.size
        codes = np.empty(size, np.uint32)
        for g in range(scales.size):
            if chosen[g]:
                for j in range(size):
                    code = np.rint((source[g * size + j] - biases[g]) / scales[g])
                    codes[j] = np.uint32(np.int32(min(max(code, zero), n)))
                _pack(codes, bits, words, g * (size * bits // 32))

    return compiled(recode)
