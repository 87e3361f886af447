"""`search` with its starts tried elsewhere than in the compiled loops, to the same bytes.

The loops say what each group begins with, another form tries the starts, and the best of them is
taken as the loops would: the first of the smallest errors. Two forms are there: arrays of MLX
(`search_arrays`) and a kernel for Metal (`search_kernel`).

What a reader would get wrong: float32 on a GPU is not float32 on a CPU. Apple's takes subnormal
numbers for zero, whatever its compiler is told. So no group is left to another form where one could
appear: weights, scales and biases are 0 or at least 2⁻⁶⁰, hence all their sums and differences
multiples of 2⁻⁸³; importances and the mean are at least 2⁻⁴⁰; and a term of the error that is not 0
is at least 2⁻¹⁰⁰, or the form says `unsure`. Ordinary weights meet all this. Other groups are done
by the loops.
"""

import threading
from collections.abc import Callable
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.codes import search_loops
from glm_quant.codes.search_loops import STATE, new_lanes

# Weights that a form is given at a time: a GPU is done with them in milliseconds.
_WEIGHTS = 1 << 20

_S, _B, _BEST = STATE.index("s"), STATE.index("b"), STATE.index("best")

_thread = threading.local()


class Problem(NamedTuple):
    """What a form is given.

    Attributes:
        w: weights, [groups, size].
        h: their importances, alike.
        state: what the loops found before the starts, [groups, len(STATE)].
        starts: shares of the way from the mean to the lower and upper end, [starts, 2].
        n: the largest code.
        dropped: bits of a float32's fraction that the dtype of s and b drops.
        limit: its largest value.
    """

    w: NDArray[np.float32]
    h: NDArray[np.float32]
    state: NDArray[np.float32]
    starts: NDArray[np.float32]
    n: np.float32
    dropped: int
    limit: np.float32


class Tried(NamedTuple):
    """What each start of each group came to, [groups, starts].

    Attributes:
        error: the smallest, which is MLX's where no step was better.
        s: the scale of that error.
        b: its bias.
        refit_s: the last refit's scale before it was rounded. To bfloat16 most numbers that differ
            round alike, so only this shows whether a form computes as it must.
        refit_b: its bias.
        unsure: whether a subnormal number may have played a part.
    """

    error: NDArray[np.float32]
    s: NDArray[np.float32]
    b: NDArray[np.float32]
    refit_s: NDArray[np.float32]
    refit_b: NDArray[np.float32]
    unsure: NDArray[np.bool_]


Form = Callable[[Problem], Tried]


class Task(NamedTuple):
    """All of a weight, as `search_loops.search` takes it."""

    values: NDArray[np.float32]
    energy: NDArray[np.float32]
    shape: tuple[int, int, int]
    starts: NDArray[np.float32]
    numbers: tuple[np.float32, int, np.float32]
    settings: tuple[np.float32, bool]
    result: tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]


def search_by_loops(task: Task) -> None:
    """Replace MLX's s and b by better ones in `task.result`."""
    *given, result = task
    search_loops.search(*given, new_lanes(), result)


def search_by(form: Form, task: Task) -> None:
    """Do what `search_by_loops` does, with the starts tried by another form."""
    scales, biases, better = task.result
    size = task.shape[0]
    step = max(1, _WEIGHTS // size)
    again = np.zeros(scales.size, np.bool_)
    for first in range(0, scales.size, step):
        part = slice(first, min(first + step, scales.size))
        problem, plain = _prepare(task, part)
        tried = form(problem)
        each, best = np.arange(len(plain)), tried.error.argmin(axis=1)
        s, b = tried.s[each, best], tried.b[each, best]
        sure = plain & ~tried.unsure.any(axis=1)
        changed = sure & ((s != problem.state[:, _S]) | (b != problem.state[:, _B]))
        scales[part][changed], biases[part][changed] = s[changed], b[changed]
        better[part] = changed
        # Nothing is better than an error of 0.
        again[part] = ~sure & (problem.state[:, _BEST] > 0)
    if again.any():
        _search_again(task, np.flatnonzero(again))


def _prepare(task: Task, part: slice) -> tuple[Problem, NDArray[np.bool_]]:
    groups, size = part.stop - part.start, task.shape[0]
    w = task.values.reshape(-1, size)[part]
    h = np.empty((groups, size), np.float32)
    state = np.empty((groups, len(STATE)), np.float32)
    plain = np.empty(groups, np.bool_)
    search_loops.prepare(
        task.values,
        task.energy,
        task.shape,
        part.start,
        task.numbers,
        task.settings,
        new_lanes(),
        task.result,
        (h, state, plain),
    )
    return Problem(w, h, state, task.starts, *task.numbers), plain


def _search_again(task: Task, groups: NDArray[np.intp]) -> None:
    """Do some groups by the loops, each as a row of its own."""
    scales, biases, better = task.result
    size, width, rows_per_unit = task.shape
    row, column = np.divmod(groups * size, width)
    unit = task.energy.reshape(-1, size)[(row // rows_per_unit * width + column) // size]
    result = scales[groups], biases[groups], np.zeros(groups.size, np.bool_)
    few = task._replace(
        values=task.values.reshape(-1, size)[groups].reshape(-1),
        energy=unit.reshape(-1),
        shape=(size, size, 1),
        result=result,
    )
    search_by_loops(few)
    scales[groups], biases[groups], better[groups] = result


def thread_stream(device: mx.Device) -> mx.Stream:
    """Return this thread's own stream of a device: MLX's streams belong to threads."""
    streams: dict[str, mx.Stream] = _thread.__dict__.setdefault("streams", {})
    if str(device) not in streams:
        streams[str(device)] = mx.new_stream(device)
    return streams[str(device)]
