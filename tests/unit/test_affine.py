"""Our affine loop makes the bytes that mx.quantize makes on its CPU backend, in odd cases too.

Ordinary weights in every scheme are in test_encode.
"""

import mlx.core as mx
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from glm_quant.codes.affine import largest_magnitude, quantize_affine

MLX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}


def bits_of(array: mx.array) -> np.ndarray:
    """The array's bits as unsigned integers."""
    return np.array(array.view(mx.uint16 if array.itemsize == 2 else mx.uint32))


def assert_same(values: np.ndarray, dtype: str, bits: int, group_size: int) -> None:
    """Hold codes, scales and biases to mx.quantize's, bit by bit."""
    with mx.stream(mx.cpu):
        weights = mx.array(values).astype(MLX[dtype])
        expected = mx.quantize(weights, group_size=group_size, bits=bits)
        found = quantize_affine(bits_of(weights), dtype, bits, group_size)
        for name, ours, theirs in zip(("codes", "scales", "biases"), found, expected, strict=True):
            theirs_bits = np.array(theirs) if name == "codes" else bits_of(theirs)
            assert np.array_equal(ours, theirs_bits), name


@settings(max_examples=200, deadline=None)
@given(
    values=hnp.arrays(
        np.float32,
        (2, 64),
        elements=st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-8, -1e-8, 3e38, -3e38]),
            st.floats(-2, 2, width=16).map(float),
            st.floats(-1e30, 1e30),
        ),
    ),
    bits=st.sampled_from([2, 3, 4, 6, 8]),
)
def test_odd_groups(values: np.ndarray, bits: int) -> None:
    """Constant, zero, one-sided, tied, tiny and huge groups."""
    assert_same(values, "BF16", bits, 64)


def test_all_negative_and_tied_groups() -> None:
    """Where mx's CPU and GPU kernels differ, every machine gets the CPU's codes."""
    negative = -np.linspace(0.5, 1.0, 64, dtype=np.float32)
    ties = np.tile(np.float32([-1.5, -0.5, 0.5, 1.5, 0.25, -0.25, 0.75, -0.75]), 8)
    assert_same(np.stack([negative, ties, np.full(64, -0.7, np.float32)]), "F32", 2, 64)


def test_largest_magnitude_finds_what_is_not_finite() -> None:
    """NaN and Inf of either sign are at or above infinity's bits, finite values below."""
    for value, is_finite in ((np.nan, False), (-np.inf, False), (np.inf, False), (3e38, True)):
        block = np.zeros((4, 4), np.float32)
        block[2, 3] = value
        assert (largest_magnitude(block.view(np.uint32)) < 0x7F800000) == is_finite
