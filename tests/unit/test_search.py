"""The search is never worse than MLX's own codes, in the error that it minimizes and in bytes."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from glm_quant.codes.affine import from_float32, quantize_affine, to_float32
from glm_quant.codes.encode import Rows, encode
from glm_quant.codes.scheme import Quantized, layouts
from glm_quant.codes.search import Search, quantize_search
from glm_quant.codes.search_loops import DROPPED, round_to

MLX = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
Made = tuple[np.ndarray, np.ndarray, np.ndarray]


def normal(rows: int = 32, width: int = 256, dtype: str = "BF16") -> np.ndarray:
    """Weights of an ordinary layer, as bits."""
    values = np.random.default_rng(5).normal(0, 0.02, (rows, width)).astype(np.float32)
    return from_float32(values, dtype)


def reconstruct(made: Made, dtype: str, bits: int, group_size: int) -> np.ndarray:
    """Take codes apart bit by bit and return the weights they stand for, exactly."""
    words, scales, biases = made
    stream = np.unpackbits(words.astype("<u4").view(np.uint8), axis=-1, bitorder="little")
    codes = stream.reshape(len(words), -1, bits) @ (1 << np.arange(bits))
    s, b = (
        np.repeat(to_float32(a, dtype).astype(np.float64), group_size, axis=-1)
        for a in (scales, biases)
    )
    return codes * s + b


def errors(
    weights: np.ndarray, dtype: str, made: Made, bits: int, group_size: int, energy: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Each group's weighted squared error and its largest error, in float64."""
    w = to_float32(weights, dtype).astype(np.float64)
    off = w - reconstruct(made, dtype, bits, group_size)
    groups = w.reshape(-1, group_size)
    importance = np.sqrt(0.75 * (groups**2).mean(axis=1, keepdims=True) + groups**2)
    importance = importance * np.broadcast_to(energy, w.shape).reshape(-1, group_size)
    off = off.reshape(-1, group_size)
    return (importance * off**2).sum(axis=1), np.abs(off).max(axis=1)


@settings(max_examples=60, deadline=None)
@given(
    values=hnp.arrays(
        np.float32,
        (3, 64),
        elements=st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-8, -1e-8, 3e38, -3e38, 1e-38]),
            st.floats(-2, 2, width=16).map(float),
            st.floats(-1e30, 1e30),
        ),
    ),
    energy=hnp.arrays(np.float32, (1, 64), elements=st.sampled_from([1e-4, 0.5, 1.0, 30.0])),
    bits=st.sampled_from([2, 3, 4, 8]),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
)
def test_never_worse(values: np.ndarray, energy: np.ndarray, bits: int, dtype: str) -> None:
    """Odd groups of all kinds: no group's weighted error or largest error is above MLX's."""
    if dtype == "F16":
        values = np.clip(values, -60000, 60000)
    weights = from_float32(values, dtype)
    plain = quantize_affine(weights, dtype, bits, 64)
    found = quantize_search(weights, dtype, bits, 64, energy)
    with np.errstate(over="ignore", invalid="ignore"):
        mine, mine_most = errors(weights, dtype, found, bits, 64, energy)
        theirs, theirs_most = errors(weights, dtype, plain, bits, 64, energy)
    same = (found[1] == plain[1]) & (found[2] == plain[2])
    assert np.array_equal(found[0][same.reshape(-1)], plain[0][same.reshape(-1)])
    # The loop adds up in float32, here float64 does.
    changed = ~same.reshape(-1)
    assert (mine[changed] <= theirs[changed] * (1 + 1e-4)).all()
    assert (mine_most[changed] <= theirs_most[changed] * (1 + 1e-5)).all()


@pytest.mark.parametrize("slack", [1.0, 1.1, 1.25])
def test_largest_error_is_bounded(slack: float) -> None:
    """No group's largest error is above `slack` times MLX's, and without a bound some are."""
    weights, ones = normal(), np.ones((1, 256), np.float32)
    _, theirs = errors(weights, "BF16", quantize_affine(weights, "BF16", 2, 64), 2, 64, ones)

    def most(bound: float) -> np.ndarray:
        made = quantize_search(weights, "BF16", 2, 64, settings=Search(slack=bound))
        return errors(weights, "BF16", made, 2, 64, ones)[1]

    assert (most(slack) <= theirs * slack * (1 + 1e-5)).all()
    assert (most(float("inf")) > theirs * slack * 1.01).any()


@pytest.mark.parametrize(("bits", "gain"), [(2, 0.25), (3, 0.2), (4, 0.15)])
def test_gains_what_the_field_measures(bits: int, gain: float) -> None:
    """On normal weights the weighted error falls by a quarter in 2 bits, less in more bits."""
    weights, ones = normal(), np.ones((1, 256), np.float32)
    found, _ = errors(weights, "BF16", quantize_search(weights, "BF16", bits, 64), bits, 64, ones)
    plain, _ = errors(weights, "BF16", quantize_affine(weights, "BF16", bits, 64), bits, 64, ones)
    assert found.sum() < plain.sum() * (1 - gain)


def test_importance_moves_the_error_to_other_columns() -> None:
    """Columns of important inputs get smaller errors than without their importance, by unit."""
    weights = normal()
    energy = np.ones((2, 256), np.float32)
    energy[0, ::8], energy[1, 1::8] = 20, 20
    each = np.repeat(energy, 16, axis=0)
    blind = quantize_search(weights, "BF16", 2, 64)
    aware = quantize_search(weights, "BF16", 2, 64, energy)
    before, _ = errors(weights, "BF16", blind, 2, 64, each)
    after, _ = errors(weights, "BF16", aware, 2, 64, each)
    for unit in (slice(0, 64), slice(64, 128)):  # four groups a row
        assert after[unit].sum() < 0.9 * before[unit].sum()


@pytest.mark.parametrize("value", [0.0, -0.0, 0.7, -0.7, 2.0**-40, -(2.0**40)])
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_groups_without_a_choice_keep_mlx_bytes(value: float, dtype: str) -> None:
    """Constant, zero, tiny and huge groups are stored as MLX stores them."""
    weights = from_float32(np.full((1, 64), value, np.float32), dtype)
    found = quantize_search(weights, dtype, 2, 64)
    for mine, theirs in zip(found, quantize_affine(weights, dtype, 2, 64), strict=True):
        assert mine.tobytes() == theirs.tobytes()


def test_scales_below_the_dtype() -> None:
    """Where float16 cannot hold a group's scale, the group is MLX's, and nothing is infinite."""
    values = np.random.default_rng(0).normal(0, 2.0**-24, (4, 64)).astype(np.float16)
    found = quantize_search(values.view(np.uint16), "F16", 4, 64)
    plain = quantize_affine(values.view(np.uint16), "F16", 4, 64)
    zero = to_float32(plain[1], "F16").reshape(-1) == 0
    assert np.isfinite(to_float32(found[1], "F16")).all()
    assert np.array_equal(found[0][zero], plain[0][zero])
    assert (to_float32(found[1], "F16").reshape(-1)[~zero] != 0).all()


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_mlx_reads_what_is_written(bits: int, group_size: int, dtype: str) -> None:
    """The layout is minmax's: as many bytes, and mx.dequantize gives our own reconstruction."""
    weights = normal(5, 384, dtype)  # no multiple of 16 groups
    scheme = Quantized("affine", bits, group_size, "search")
    stored = encode(Rows(weights, dtype), scheme, "")
    planned = layouts(scheme, weights.shape, dtype)
    assert [array.nbytes for array in stored] == [layout.size_bytes for layout in planned]
    made = quantize_search(weights, dtype, bits, group_size)
    assert [array.tobytes() for array in made] == [array.tobytes() for array in stored]
    with mx.stream(mx.cpu):
        scales, biases = (mx.array(to_float32(a, dtype)) for a in made[1:])
        read = mx.dequantize(mx.array(made[0]), scales, biases, group_size=group_size, bits=bits)
    expected = reconstruct(made, dtype, bits, group_size)
    np.testing.assert_allclose(np.array(read), expected, rtol=0, atol=2e-7 * np.abs(expected).max())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_scales_are_values_of_their_dtype(dtype: str) -> None:
    """Rounding in the loop is the dtype's own, down to float16's subnormal numbers."""
    values = np.random.default_rng(1).normal(0, 1, 4096).astype(np.float32)
    values *= np.float32(2.0) ** np.random.default_rng(2).integers(-30, 10, 4096)
    expected = to_float32(from_float32(values, dtype), dtype)
    round_to(values, DROPPED[dtype])
    assert np.array_equal(values, expected)


def test_pinned_bytes() -> None:
    """The bytes are pinned to encode.VERSION, on every machine and for any blocks of rows.

    The weights come from a hash, so nothing but the loop decides the digest.
    """
    raw = hashlib.shake_128(b"search").digest(2 * 64 * 256)
    # Magnitudes 2^-6 to 2^-2, of both signs.
    weights = (np.frombuffer(raw, "<u2") % 0x200 + 0x3C80).astype(np.uint16)
    weights |= (np.frombuffer(raw, "<u2") & 0x8000).astype(np.uint16)
    weights = weights.reshape(64, 256)
    digest = hashlib.sha256()
    for bits in (2, 3, 4, 6):
        whole = quantize_search(weights, "BF16", bits, 64)
        parts = [quantize_search(weights[i : i + 7], "BF16", bits, 64) for i in range(0, 64, 7)]
        for k, array in enumerate(whole):
            assert np.array_equal(array, np.concatenate([part[k] for part in parts]))
            digest.update(array.tobytes())
    assert digest.hexdigest() == PINNED


PINNED = "59c98df8d38078539e9d3f9877f511dedc429b81c0f7627a4096fdc55cac64fd"
