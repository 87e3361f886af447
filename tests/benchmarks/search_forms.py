"""Weights a second of each form of `search`: loops, MLX's arrays, and the kernel where Metal is.

uv run python -m tests.benchmarks.search_forms

Then a projection for an M3 Ultra, on which nobody has run it: the kernel's operations, counted by
running its text (`search_operations`), and its bytes, against what that machine could do at most.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import numpy as np

from glm_quant.codes.affine import Bits, from_float32
from glm_quant.codes.search import quantize_search
from glm_quant.codes.search_arrays import try_in_arrays
from glm_quant.codes.search_forms import Form, Problem, Tried
from glm_quant.codes.search_kernel import try_on_metal
from glm_quant.codes.search_loops import STATE
from tests.benchmarks.search_operations import Counter

GROUP_SIZE, WIDTH = 64, 2048
# GLM-5.2's parameters.
WEIGHTS = 744e9


class Gpu(NamedTuple):
    """What a GPU does in a second at most."""

    cores: int  # as Apple publishes it
    bytes_per_second: float  # as Apple publishes it
    lanes: int  # of a core, an operation a cycle each; measured by others, not by Apple
    hertz: float  # measured by others, not by Apple


M3_ULTRA, M3_ULTRA_CPU_CORES = Gpu(80, 819e9, 128, 1.4e9), 24
# 32-bit operations in place of one division, and of one on 64-bit integers: guesses.
DIVISION, LONG = 10, 4


def rate(
    weights: Bits,
    bits: int,
    form: Form | None,
    rounds: int,
    workers: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Return weights a second, best of some rounds; each worker has rows of its own."""
    encode = partial(quantize_search, dtype="BF16", bits=bits, group_size=GROUP_SIZE, form=form)
    encode(weights[:1])  # compiled, or loaded
    parts = np.array_split(weights, workers)
    seconds: list[float] = []
    with ThreadPoolExecutor(workers) as pool:
        for _ in range(rounds):
            begin = clock()
            # One worker is this thread itself, whose clock is asked.
            list((pool.map if workers > 1 else map)(encode, parts))
            seconds.append(clock() - begin)
    return weights.size / min(seconds)


def try_nothing(problem: Problem) -> Tried:
    """Keep MLX's solution: what is left is the loops' share of the work."""
    error, s, b = (problem.state[:, STATE.index(name), None] for name in ("best", "s", "b"))
    return Tried(error, s, b, s, b, np.zeros(error.shape, np.bool_))


def copying_rate(rounds: int) -> float:
    """Return weights a second whose values and importances are copied for MLX, by one thread."""
    values = np.ones((1 << 14, GROUP_SIZE), np.float32)
    seconds: list[float] = []
    for _ in range(rounds):
        begin = time.thread_time()
        mx.array(values)
        seconds.append(time.thread_time() - begin)
    return values.size / min(seconds) / 2


def measure(bits: int, rounds: int) -> dict[str, float]:
    """Return millions of weights a second of each form on this machine.

    What runs on one core is timed by that thread's CPU seconds, the rest by the wall's.
    """
    values = np.random.default_rng(0).normal(0, 0.02, (1024, WIDTH)).astype(np.float32)
    weights = from_float32(values, "BF16")
    cores = os.cpu_count() or 1
    on_cpu = partial(try_in_arrays, device=mx.Device(mx.cpu))
    found = {
        "loops, 1 core": rate(weights, bits, None, rounds, clock=time.thread_time),
        f"loops, {cores} cores": rate(weights, bits, None, rounds, cores),
        "all but the starts, 1 core": rate(
            weights, bits, try_nothing, rounds, clock=time.thread_time
        ),
        "copied for MLX, 1 core": copying_rate(rounds),
        "arrays on the CPU": rate(weights[:64], bits, on_cpu, rounds),
    }
    if mx.default_device() == mx.gpu:
        found["arrays on the GPU"] = rate(weights, bits, try_in_arrays, rounds)
    if mx.metal.is_available():
        found["kernel"] = rate(weights, bits, try_on_metal, rounds)
        found[f"kernel, {cores} threads"] = rate(weights, bits, try_on_metal, rounds, cores)
    return {name: round(value / 1e6, 2) for name, value in found.items()}


def project(bits: int, gpu: Gpu) -> dict[str, float]:
    """Return what the kernel does for a weight, and the least seconds it takes for all of them."""
    values = np.random.default_rng(0).normal(0, 0.02, (32, WIDTH)).astype(np.float32)
    moved = 0
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(Path(folder))

        def watch(problem: Problem) -> Tried:
            nonlocal moved
            tried = counter.form(problem)
            moved += sum(array.nbytes for array in (*problem[:3], *tried))
            return tried

        quantize_search(from_float32(values, "BF16"), "BF16", bits, GROUP_SIZE, form=watch)
        simple, divisions, long = (count / values.size for count in counter.operations())
    cycles = simple + DIVISION * divisions + LONG * long
    return {
        "float32 operations": round(simple, 1),
        "divisions": round(divisions, 1),
        "64-bit integer operations": round(long, 1),
        "bytes": round(moved / values.size, 2),
        "seconds of arithmetic": round(WEIGHTS * cycles / (gpu.cores * gpu.lanes * gpu.hertz), 1),
        "seconds of memory": round(WEIGHTS * moved / values.size / gpu.bytes_per_second, 1),
    }


def main() -> None:
    """Print one JSON value."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result = {}
    for bits in (2, 3, 4):
        measured = measure(bits, options.rounds)
        loops, rest, copies = (
            round(WEIGHTS / (measured[f"{name}, 1 core"] * 1e6) / cores)
            for name, cores in (
                ("loops", M3_ULTRA_CPU_CORES),
                ("all but the starts", M3_ULTRA_CPU_CORES),
                ("copied for MLX", 1),  # Python's lock is held
            )
        )
        result[f"{bits} bits"] = {
            "millions of weights a second": measured,
            "projected for an M3 Ultra and 744 B weights": {
                "its GPU": project(bits, M3_ULTRA),
                "its CPU, were its cores like this one": {
                    "seconds for all": loops,
                    "seconds for all but the starts": rest,
                    "seconds of one core to copy for the GPU": copies,
                },
            },
        }
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
