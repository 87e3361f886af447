"""Weights a second that `search` and `gptq` encode on one core, by bits; `minmax` to compare.

uv run python -m tests.benchmarks.search_speed
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from glm_quant.codes.affine import Bits, from_float32, quantize_affine
from glm_quant.codes.gptq import quantize_gptq
from glm_quant.codes.search import quantize_search

# GLM-5.2's routed experts: what gate and up meet, and what down meets.
WIDTHS = (6144, 2048)


def rate(quantize: Callable[..., Any], weights: Bits, bits: int, rounds: int) -> float:
    """Return millions of weights a second: best of some rounds, in CPU seconds of this thread."""
    quantize(weights[:1], "BF16", bits, 64)  # compiled, or loaded
    seconds: list[float] = []
    for _ in range(rounds):
        begin = time.thread_time()
        quantize(weights, "BF16", bits, 64)
        seconds.append(time.thread_time() - begin)
    return weights.size / min(seconds) / 1e6


def factor(rng: np.random.Generator, width: int) -> np.ndarray:
    """Return some upper triangular U: its values do not decide the time."""
    upper = np.triu(rng.normal(0, 0.01, (width, width)), 1) + np.eye(width)
    return upper.astype(np.float32)


def main() -> None:
    """Print a line for each width and number of bits."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    for width in WIDTHS:
        weights = from_float32(rng.normal(0, 0.02, (512, width)).astype(np.float32), "BF16")
        gptq = partial(quantize_gptq, factor=factor(rng, width))
        for bits in (2, 3, 4):
            minmax, search, spread = (
                rate(quantize, weights, bits, options.rounds)
                for quantize in (quantize_affine, quantize_search, gptq)
            )
            print(
                f"width {width}, {bits} bits g64: minmax {minmax:.0f}, search {search:.1f}, gptq "
                f"{spread:.2f} M weights/s a core",
                flush=True,
            )


if __name__ == "__main__":
    main()
