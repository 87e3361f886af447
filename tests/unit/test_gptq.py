"""`gptq`: less output error than `search` in the same bytes, and the same bytes every time."""

import hashlib

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_quant.calibration.hessian import DAMPING, cholesky_factor
from glm_quant.codes import gptq
from glm_quant.codes.affine import from_float32, to_float32
from glm_quant.codes.gptq import quantize_gptq
from glm_quant.codes.search import quantize_search

WIDTH, ROWS = 128, 48


def expanded(made: tuple[np.ndarray, ...], bits: int, size: int = 64) -> np.ndarray:
    """The values that codes stand for."""
    codes, scales, biases = made
    floats = [mx.array(to_float32(part, "BF16")) for part in (scales, biases)]
    return np.array(mx.dequantize(mx.array(codes), *floats, group_size=size, bits=bits))


@pytest.fixture(scope="module")
def layer() -> tuple[np.ndarray, np.ndarray]:
    """Weights [rows, width], and inputs [tokens, width] whose columns move together."""
    rng = np.random.default_rng(0)
    weights = rng.normal(0, 0.02, (ROWS, WIDTH)).astype(np.float32)
    inputs = rng.normal(size=(2000, 24)) @ rng.normal(size=(24, WIDTH))
    return weights, inputs + 0.3 * rng.normal(size=inputs.shape)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_output_error_falls(layer: tuple[np.ndarray, np.ndarray], bits: int) -> None:
    """On inputs of the same kind, the layer's output is far nearer than with `search`."""
    weights, inputs = layer
    stored = from_float32(weights, "BF16")
    exact = to_float32(stored, "BF16")
    seen, unseen = inputs[:1000], inputs[1000:]
    factor = cholesky_factor(seen.T @ seen, len(seen))
    errors = [
        np.square(unseen @ (expanded(made, bits) - exact).T).sum()
        for made in (
            quantize_search(stored, "BF16", bits, 64),
            quantize_gptq(stored, "BF16", bits, 64, factor),
        )
    ]
    assert errors[1] < 0.6 * errors[0]


def by_hand(
    weights: np.ndarray, made: tuple[np.ndarray, ...], factor: np.ndarray, bits: int
) -> np.ndarray:
    """Codes by the formula of the module, one column at a time, in float64."""
    scales, biases = (np.repeat(to_float32(part, "BF16"), 64, 1) for part in made[1:])
    left, codes = weights.astype(np.float64), np.zeros(weights.shape)
    for j in range(weights.shape[1]):
        codes[:, j] = np.clip(np.rint((left[:, j] - biases[:, j]) / scales[:, j]), 0, 2**bits - 1)
        error = (left[:, j] - codes[:, j] * scales[:, j] - biases[:, j]) / factor[j, j]
        left[:, j + 1 :] -= error[:, None] * factor[j, j + 1 :]
    return codes * scales + biases


@pytest.mark.parametrize("bits", [2, 4])
def test_codes_are_those_of_the_formula(layer: tuple[np.ndarray, np.ndarray], bits: int) -> None:
    """Under the scales that were chosen, nearly every code is GPTQ's own, column by column."""
    weights, inputs = layer
    stored = from_float32(weights, "BF16")
    factor = cholesky_factor(inputs.T @ inputs, len(inputs))
    made = quantize_gptq(stored, "BF16", bits, 64, factor)
    expected = by_hand(to_float32(stored, "BF16"), made, factor, bits)
    # A tie that float32 and float64 round apart changes what follows it in its row.
    same = np.isclose(expanded(made, bits), expected, rtol=1e-5, atol=1e-7).mean()
    assert same > 0.98


def test_inputs_that_do_not_move_together_give_nearest_codes(
    layer: tuple[np.ndarray, np.ndarray],
) -> None:
    """With H = 1 no column tells anything of another: each code is the nearest, for less error."""
    stored = from_float32(layer[0], "BF16")
    exact = to_float32(stored, "BF16")
    made = quantize_gptq(stored, "BF16", 2, 64, cholesky_factor(np.eye(WIDTH), 1))
    ours = expanded(made, 2)
    scales, biases = (np.repeat(to_float32(part, "BF16"), 64, 1) for part in made[1:])
    every = scales[..., None] * np.arange(4) + biases[..., None]
    nearest = np.abs(every - exact[..., None]).min(axis=-1)
    np.testing.assert_allclose(np.abs(ours - exact), nearest, atol=1e-6)
    theirs = expanded(quantize_search(stored, "BF16", 2, 64), 2)
    assert np.square(ours - exact).sum() < np.square(theirs - exact).sum()


def test_refined_grids_cost_the_output_less(
    layer: tuple[np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On unseen inputs the error falls, and the output keeps its size as it does unrefined."""
    weights, inputs = layer
    stored = from_float32(weights, "BF16")
    exact = to_float32(stored, "BF16")
    factor = cholesky_factor(inputs[:1000].T @ inputs[:1000], 1000)
    unseen = inputs[1000:] @ exact.T
    found: dict[bool, tuple[float, float]] = {}
    for refined in (True, False):
        if not refined:
            monkeypatch.setattr(gptq.Group, "refine", lambda _group, grid, _dtype: grid)
        out = inputs[1000:] @ expanded(gptq.quantize_gptq(stored, "BF16", 2, 64, factor), 2).T
        error = np.square(out - unseen).sum() / np.square(unseen).sum()
        found[refined] = float(error), float((out * unseen).sum() / np.square(unseen).sum())
    assert found[True][0] < 0.95 * found[False][0]
    assert abs(1 - found[True][1]) < abs(1 - found[False][1]) + 0.005


def test_a_grid_is_never_worse_than_the_one_to_begin_with() -> None:
    """Wherever it begins, even in float16 near its end, and for weights of one value."""
    rng = np.random.default_rng(5)
    inputs = rng.normal(size=(300, 64)) @ rng.normal(size=(64, 64))
    factor = cholesky_factor(inputs.T @ inputs, 300)
    for scale in (1e-4, 1.0, 3e4):
        values = rng.normal(0, scale, (32, 64)).clip(-6e4, 6e4).astype(np.float32)
        values[0] = scale
        stored = from_float32(values, "F16")
        exact = to_float32(stored, "F16")
        _, s, b = quantize_search(stored, "F16", 3, 64)
        begun = to_float32(s[:, 0], "F16"), to_float32(b[:, 0], "F16")
        group = gptq.Group(exact, factor, np.float32(7))
        grid = group.refine(begun, "F16")
        assert all(np.isfinite(part).all() for part in grid)
        costs = [cost_of(group.choose(one), exact, factor) for one in (grid, begun)]
        assert (costs[0] <= costs[1] * (1 + 1e-6)).all()
        assert costs[0][0] == costs[1][0] == 0


def cost_of(errors: np.ndarray, weights: np.ndarray, factor: np.ndarray) -> np.ndarray:
    """What `refine` makes least, by its formula in float64."""
    e, a = errors.T.astype(np.float64), weights @ np.linalg.inv(factor.astype(np.float64))
    size = np.square(a).sum(1)
    return np.square(e).sum(1) + 2 * (e * a).sum(1) ** 2 / np.where(size > 0, size, 1)


@given(st.integers(1, 5), st.sampled_from([8, 70]), st.sampled_from([2, 3, 6]), st.booleans())
def test_rows_do_not_depend_on_their_neighbours(
    seed: int, rows: int, bits: int, weighted: bool
) -> None:
    """Any division into blocks gives the same bytes, and each unit has its own importance."""
    rng = np.random.default_rng(seed)
    units = 2
    stored = from_float32(rng.standard_t(4, (units * rows, 64)).astype(np.float32), "BF16")
    inputs = rng.normal(size=(200, 64)) @ rng.normal(size=(64, 64))
    factor = cholesky_factor(inputs.T @ inputs, len(inputs))
    energy = rng.uniform(0.5, 2, (units, 64)).astype(np.float32) if weighted else None
    whole = quantize_gptq(stored, "BF16", bits, 32, factor, energy)
    for unit in range(units):
        part = slice(unit * rows, (unit + 1) * rows)
        own = None if energy is None else energy[unit : unit + 1]
        for a, b in zip(
            whole, quantize_gptq(stored[part], "BF16", bits, 32, factor, own), strict=True
        ):
            np.testing.assert_array_equal(a[part], b)


def pinned_digest(bits: int, size: int) -> str:
    """The digest of codes of weights and factor that come from a hash, with whole powers of 2."""
    raw = np.frombuffer(hashlib.shake_128(b"gptq").digest(4 * 150 * 384), "<u4").reshape(150, 384)
    weights = (((raw >> 16) & 0x8000) | (raw % 0x200 + 0x3C80)).astype(np.uint16)
    raw = np.frombuffer(hashlib.shake_128(b"factor").digest(4 * 384 * 384), "<i4")
    factor = np.triu(raw.reshape(384, 384).astype(np.float32) / np.float32(2**34), 1)
    factor += np.diag(np.arange(384, dtype=np.float32) % 3 / 4 + 1)
    energy = (raw[: 3 * 384].astype(np.float32) / np.float32(2**33) + 1).reshape(3, 384)
    digest = hashlib.sha256()
    for importance in (None, energy):
        for array in quantize_gptq(weights, "BF16", bits, size, factor, importance):
            digest.update(array.tobytes())
    return digest.hexdigest()


@pytest.mark.parametrize(
    ("bits", "size", "digest"),
    [
        (2, 64, "eeb56a729d2487b37b9e64bb2bb9ee2d4f99cf106973c9b562b618f21a9da06f"),
        (3, 128, "5972e64f84c9b80c940f067873edc843ccb75fe7ab28fe16db1bb16e679a3f7a"),
        (4, 32, "1466f0312059f86105d0ba65fe22ebea34b1df35886049366a65421485397542"),
    ],
)
def test_pinned_bytes(bits: int, size: int, digest: str) -> None:
    """The bytes are pinned to encode.VERSION; widths and rows here fill no tile and no block."""
    assert pinned_digest(bits, size) == digest


def test_degenerate_groups(layer: tuple[np.ndarray, np.ndarray]) -> None:
    """Zero and constant rows come out exact and finite; nothing seen at all is `search`."""
    stored = from_float32(np.full((4, WIDTH), 0.5, np.float32), "BF16")
    stored[1] = 0
    factor = cholesky_factor(layer[1].T @ layer[1], len(layer[1]))
    np.testing.assert_array_equal(
        expanded(quantize_gptq(stored, "BF16", 2, 64, factor), 2), to_float32(stored, "BF16")
    )
    np.testing.assert_array_equal(cholesky_factor(np.zeros((4, 4)), 0), np.eye(4, dtype=np.float32))


def test_factor_is_that_of_the_inverse() -> None:
    """Uᵀ·U is the inverse of H with its share of the mean diagonal."""
    rng = np.random.default_rng(1)
    inputs = rng.normal(size=(50, 16)) * rng.uniform(0.1, 3, 16)
    factor = cholesky_factor(inputs.T @ inputs, 50).astype(np.float64)
    damped = inputs.T @ inputs / 50
    damped += DAMPING * np.trace(damped) / 16 * np.eye(16)
    assert np.allclose(factor, np.triu(factor))
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(16), atol=1e-4)
