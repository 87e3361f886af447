"""Where `search` tries its starts on this machine: on a GPU that proved itself, or in the loops.

On Metal the kernel is a candidate, on another GPU the array form, without a GPU none. A candidate
is used for a scheme only if, on this machine and in this process, it gave the loops' bytes for
groups that are made to be hard, and encodes faster when all cores encode. So what runs decides
the time and never a byte. Why a candidate is not used is logged.
"""

import logging
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.codes.affine import Bits, from_float32
from glm_quant.codes.search import quantize_search
from glm_quant.codes.search_arrays import try_in_arrays
from glm_quant.codes.search_forms import Form, Problem, Tried
from glm_quant.codes.search_kernel import try_on_metal
from glm_quant.codes.search_loops import LIMIT

_log = logging.getLogger(__name__)

# Weights of the proof for each kind of hard group, and of the race for each core.
_PROOF, _RACE = 1 << 14, 1 << 19

_lock = threading.Lock()
_chosen: dict[tuple[str, int, int], Form | None] = {}


def device_form(dtype: str, bits: int, group_size: int) -> Form | None:
    """Return what tries the starts of a scheme here; None: the compiled loops.

    The first call for a scheme proves and times it, which takes some seconds on a GPU.

    Args:
        dtype: "BF16", "F16" or "F32".
        bits: of a code.
        group_size: weights of a group.
    """
    form = _candidate()
    if form is None:
        return None
    scheme = dtype, bits, group_size
    with _lock:
        if scheme not in _chosen:
            reason = refusal(form, *scheme, cores=os.cpu_count() or 1)
            what = f"search of {dtype} in {bits} bits, groups of {group_size}"
            if reason is None:
                _log.info("%s runs on %s", what, mx.default_device())
            else:
                _log.warning("%s stays on the CPU, with the same bytes: %s", what, reason)
            _chosen[scheme] = None if reason else form
        return _chosen[scheme]


def _candidate() -> Form | None:
    if mx.default_device() != mx.gpu:
        return None
    return try_on_metal if mx.metal.is_available() else try_in_arrays


def refusal(form: Form, dtype: str, bits: int, group_size: int, cores: int) -> str | None:
    """Say why a form is not to be used for a scheme on this machine, or None; see below."""
    try:
        return disproof(form, dtype, bits, group_size) or slowness(
            form, dtype, bits, group_size, cores
        )
    except Exception as error:  # whatever MLX and its compilers may raise
        return f"it failed with {type(error).__name__}: {error}"


def disproof(form: Form, dtype: str, bits: int, group_size: int) -> str | None:
    """Say what is wrong with a form for a scheme on this machine, or None.

    Args:
        form: what to prove.
        dtype: "BF16", "F16" or "F32".
        bits: of a code.
        group_size: weights of a group.
    """
    wrong = _count_wrong(form, dtype, bits, group_size)
    return f"{wrong:,} hard groups differ from the compiled loops'" if wrong else None


def slowness(form: Form, dtype: str, bits: int, group_size: int, cores: int) -> str | None:
    """Say by how much a form loses to the loops on this machine, or None if it does not.

    Args:
        form: what to time, after it was run once.
        dtype: "BF16", "F16" or "F32".
        bits: of a code.
        group_size: weights of a group.
        cores: how many threads encode, each its own weights.
    """
    mine, loops = (
        _seconds(candidate, dtype, bits, group_size, cores) * 1e9 / (_RACE * cores)
        for candidate in (form, None)
    )
    if mine <= loops:
        return None
    return f"on {cores} cores it takes {mine:.2f} ns a weight, the loops {loops:.2f}"


def _count_wrong(form: Form, dtype: str, bits: int, group_size: int) -> int:
    """Count hard groups that come out otherwise than from the loops.

    What each start came to is compared as well, bit for bit, with the array form on the CPU.
    """
    wrong = 0

    def compare(problem: Problem) -> Tried:
        nonlocal wrong
        mine, theirs = form(problem), try_in_arrays(problem, mx.Device(mx.cpu))
        differ = np.zeros(mine.error.shape, np.bool_)
        for found, expected in zip(mine[:-1], theirs[:-1], strict=True):
            differ |= found.view(np.uint32) != expected.view(np.uint32)
        wrong += int((differ & ~mine.unsure & ~theirs.unsure).any(axis=1).sum())
        return mine

    for weights, energy in hard_groups(dtype, bits, group_size):
        expected = quantize_search(weights, dtype, bits, group_size, energy)
        made = quantize_search(weights, dtype, bits, group_size, energy, form=compare)
        differ = np.zeros(len(weights), np.bool_)
        for mine, theirs in zip(made, expected, strict=True):
            differ |= (mine != theirs).any(axis=1)
        wrong += int(differ.sum())
    return wrong


def _seconds(form: Form | None, dtype: str, bits: int, group_size: int, cores: int) -> float:
    """Time some weights on each core at once: a GPU is shared, and so is what Python does."""
    rng = np.random.default_rng(1)
    values = rng.normal(0, 0.02, (_RACE // group_size, group_size)).astype(np.float32)
    weights = from_float32(values, dtype)

    def encode(_: int) -> None:
        quantize_search(weights, dtype, bits, group_size, form=form)

    with ThreadPoolExecutor(cores) as pool:
        list(pool.map(encode, range(cores)))  # streams of threads are made
        begin = time.perf_counter()
        list(pool.map(encode, range(cores)))
        return time.perf_counter() - begin


def hard_groups(dtype: str, bits: int, group_size: int) -> list[tuple[Bits, NDArray[np.float32]]]:
    """Return weights that catch another arithmetic, [groups, group_size], each with energies.

    Normal ones and heavy tails (contracted products), values halfway between codes (divisions that
    are not exact, other roundings), few values, one sign, outliers, nothing but zeros, magnitudes
    of all sizes down to subnormal ones.
    """
    rng = np.random.default_rng(0)
    shape = (_PROOF // group_size, group_size)
    codes = rng.integers(0, 1 << bits, shape)
    step = rng.integers(1, 1 << 8, (shape[0], 1)) * 2.0 ** rng.integers(-16, -6, (shape[0], 1))
    spread = 2.0 ** rng.integers(-148, 127, (shape[0], 1))
    outliers = rng.normal(0, 0.02, shape)
    outliers[:, :2] *= 30
    kinds = [
        rng.normal(0, 0.02, shape),
        rng.standard_t(2, shape) * 0.02,
        (codes + rng.choice([0, 0.5, -0.5], shape) - (1 << bits) // 2) * step,
        rng.choice([0, 1, -1, 0.5, 3], shape) * step,
        np.abs(rng.normal(0.05, 0.02, shape)) * rng.choice([-1, 1], (shape[0], 1)),
        outliers,
        rng.normal(0, 1, shape) * spread,
        rng.normal(0, 1, shape) * 2.0 ** rng.integers(-80, 1, shape),
        np.where(rng.random(shape) < 0.9, 0, rng.normal(0, 1, shape) * spread),
    ]
    energy = rng.lognormal(0, 1, (1, group_size)).astype(np.float32)
    ones = np.ones_like(energy)
    found: list[tuple[Bits, NDArray[np.float32]]] = []
    for number, values in enumerate(kinds):
        held = np.clip(values, -LIMIT[dtype], LIMIT[dtype]).astype(np.float32)
        found.append((from_float32(held, dtype), ones if number % 2 else energy))
    return found
