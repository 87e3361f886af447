"""`search` gives the same bytes with its starts tried by loops, MLX's arrays, or the kernel."""

import logging
import platform
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from glm_quant.codes import search_device
from glm_quant.codes.affine import from_float32
from glm_quant.codes.encode import Rows, encode
from glm_quant.codes.scheme import Quantized
from glm_quant.codes.search import Search, quantize_search
from glm_quant.codes.search_arrays import try_in_arrays
from glm_quant.codes.search_device import (
    device_form,
    disproof,
    hard_groups,
    refusal,
    slowness,
)
from glm_quant.codes.search_forms import Form, Problem, Tried
from glm_quant.codes.search_kernel import try_on_metal
from glm_quant.codes.search_loops import STATE
from tests.metal_as_cpp import EXACT, kernel

# What may be a float32 product and sum in one rounding, by machine.
CONTRACTED = ("-ffp-contract=fast", *(["-mfma"] if platform.machine() == "x86_64" else []))

# Not -ffast-math: linked with it, a library makes the whole process flush subnormal numbers.
REORDERED = ("-O3", "-fassociative-math", "-fno-signed-zeros", "-fno-trapping-math")


@pytest.fixture(scope="module")
def as_cpp(tmp_path_factory: pytest.TempPathFactory) -> Form:
    """The Metal kernel, compiled as C++."""
    return kernel(tmp_path_factory.mktemp("kernel"))


def same(made: tuple[np.ndarray, ...], expected: tuple[np.ndarray, ...]) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(made, expected, strict=True))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_kernel_equals_the_loops(as_cpp: Form, dtype: str, bits: int, group_size: int) -> None:
    """Hard groups of every kind, with and without energies, come out alike to the byte."""
    for weights, energy in hard_groups(dtype, bits, group_size):
        few = weights[:16]
        expected = quantize_search(few, dtype, bits, group_size, energy)
        assert same(quantize_search(few, dtype, bits, group_size, energy, form=as_cpp), expected)


@pytest.mark.parametrize("scheme", [("BF16", 2, 64), ("F16", 3, 32), ("F32", 4, 128)])
def test_arrays_equal_kernel_and_loops(as_cpp: Form, scheme: tuple[str, int, int]) -> None:
    """What each start comes to is the same to the bit in both forms; so are the bytes."""
    assert disproof(as_cpp, *scheme) is None
    assert disproof(try_in_arrays, *scheme) is None


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    values=hnp.arrays(
        np.float32,
        (3, 128),
        elements=st.one_of(
            st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-8, -1e-8, 3e38, -3e38, 1e-38, 1e-44]),
            st.floats(-2, 2, width=16).map(float),
            st.floats(-1e30, 1e30),
        ),
    ),
    energy=hnp.arrays(np.float32, (1, 128), elements=st.sampled_from([1e-4, 0.5, 1.0, 30.0])),
    bits=st.sampled_from([2, 3, 4, 8]),
    group_size=st.sampled_from([32, 64, 128]),
    dtype=st.sampled_from(["BF16", "F16", "F32"]),
    slack=st.sampled_from([1.0, 1.25, float("inf")]),
)
def test_odd_groups(
    as_cpp: Form,
    values: np.ndarray,
    energy: np.ndarray,
    bits: int,
    group_size: int,
    dtype: str,
    slack: float,
) -> None:
    """Whatever the weights, all forms give the same bytes."""
    weights = from_float32(np.clip(values, -60000, 60000) if dtype == "F16" else values, dtype)
    given = weights, dtype, bits, group_size, energy, Search(slack=slack)
    expected = quantize_search(*given)
    for form in (as_cpp, try_in_arrays):
        assert same(quantize_search(*given, form=form), expected)


def test_units_and_pieces(as_cpp: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row meets its own unit's energies, wherever a form's piece of the weight begins."""
    rng = np.random.default_rng(3)
    weights = from_float32(rng.normal(0, 0.02, (12, 192)).astype(np.float32), "BF16")
    weights[5, 70] = 1  # a subnormal number: this group is for the loops
    energy = rng.lognormal(0, 1, (3, 192)).astype(np.float32)
    asked: list[int] = []

    def form(problem: Problem) -> Tried:
        asked.append(len(problem.w))
        return as_cpp(problem)

    monkeypatch.setattr("glm_quant.codes.search_forms._WEIGHTS", 7 * 64)
    made = quantize_search(weights, "BF16", 2, 64, energy, form=form)
    assert asked == [7] * 5 + [1]
    assert same(made, quantize_search(weights, "BF16", 2, 64, energy))


def test_ordinary_weights_are_left_to_the_form(as_cpp: Form) -> None:
    """No group of an ordinary layer has to be done again by the loops."""
    weights, energy = hard_groups("BF16", 2, 64)[0]
    unsure: list[int] = []

    def form(problem: Problem) -> Tried:
        tried = as_cpp(problem)
        unsure.append(int(tried.unsure.sum()))
        return tried._replace(s=tried.s * 2)  # so that what is used can be seen

    made = quantize_search(weights, "BF16", 2, 64, energy, form=form)
    expected = quantize_search(weights, "BF16", 2, 64, energy)
    assert sum(unsure) == 0
    assert (made[1] != expected[1]).all()


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flushing is switched on as x86-64 does")
@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_flushed_subnormal_numbers_change_nothing(tmp_path: Path, dtype: str) -> None:
    """Apple's GPUs take subnormal numbers for zero: the bytes are the same."""
    assert disproof(kernel(tmp_path, (*EXACT, "-DFLUSH")), dtype, 2, 64) is None


@pytest.mark.parametrize("flags", [CONTRACTED, (*EXACT, "-DRECIPROCAL"), REORDERED])
def test_another_arithmetic_is_found_out(tmp_path: Path, flags: tuple[str, ...]) -> None:
    """Contracted products, divisions by a reciprocal, sums in another order: none is used."""
    assert "hard groups differ" in str(disproof(kernel(tmp_path, flags), "BF16", 2, 64))


def test_wrong_candidate_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A GPU that computes otherwise is not used, and the log says why; it is asked once."""
    wrong = kernel(tmp_path, CONTRACTED)
    rows = Rows(hard_groups("BF16", 3, 64)[0][0], "BF16")
    scheme = Quantized("affine", 3, 64, "search")
    expected = encode(rows, scheme, "")
    monkeypatch.setattr(search_device, "_candidate", lambda: wrong)
    monkeypatch.setattr(search_device, "_chosen", {})
    with caplog.at_level(logging.INFO):
        assert same(tuple(encode(rows, scheme, "")), tuple(expected))
        encode(rows, scheme, "")
    (record,) = caplog.records
    assert "search of BF16 in 3 bits, groups of 64 stays on the CPU" in record.getMessage()
    assert "differ from the compiled loops'" in record.getMessage()


def test_right_and_fast_candidate_is_used(
    as_cpp: Form, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that gives the loops' bytes in less time tries the starts of what is encoded."""
    calls: list[int] = []

    def form(problem: Problem) -> Tried:
        calls.append(len(problem.w))
        return as_cpp(problem)

    rows = Rows(hard_groups("BF16", 3, 64)[0][0], "BF16")
    scheme = Quantized("affine", 3, 64, "search")
    expected = encode(rows, scheme, "")
    monkeypatch.setattr(search_device, "_candidate", lambda: form)
    monkeypatch.setattr(search_device, "_chosen", {})
    monkeypatch.setattr(search_device, "slowness", lambda *_, **__: None)
    assert device_form("BF16", 3, 64) is form
    calls.clear()
    assert same(tuple(encode(rows, scheme, "")), tuple(expected))
    assert calls == [len(rows.bits)]


def test_slow_candidate_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU the array form loses to the loops, and both times are said."""
    monkeypatch.setattr(search_device, "_RACE", 1 << 14)
    reason = slowness(lambda problem: try_in_arrays(problem, mx.Device(mx.cpu)), "BF16", 8, 64, 2)
    assert "on 2 cores it takes" in str(reason)


def test_fast_candidate() -> None:
    """What takes less time than the loops is not called slow."""
    assert slowness(_try_nothing, "BF16", 2, 64, 2) is None


def _try_nothing(problem: Problem) -> Tried:
    error, s, b = (problem.state[:, STATE.index(name), None] for name in ("best", "s", "b"))
    return Tried(error, s, b, s, b, np.zeros(error.shape, np.bool_))


@pytest.mark.skipif(mx.metal.is_available(), reason="there is Metal here")
def test_without_metal() -> None:
    """A kernel that cannot be compiled is no error but a reason."""
    assert "it failed with" in str(refusal(try_on_metal, "BF16", 2, 64, cores=2))


@pytest.mark.skipif(not mx.metal.is_available(), reason="needs Metal")
def test_kernel_on_metal() -> None:
    """On this machine's GPU the kernel gives the loops' bytes."""
    for dtype in ("BF16", "F16", "F32"):
        for bits in (2, 3, 4, 5, 6, 8):
            assert disproof(try_on_metal, dtype, bits, 64) is None
