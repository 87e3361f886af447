"""Weights a second that `search` encodes on one core, by bits; `minmax` for comparison.

uv run python tests/benchmarks/search_speed.py
"""

import argparse
import time

import numpy as np

from glm_quant.quantize.affine import from_float32, quantize_affine
from glm_quant.quantize.search import quantize_search


def main() -> None:
    """Print a line for each number of bits: best of some rounds, in CPU seconds of this thread."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    values = np.random.default_rng(0).normal(0, 0.02, (512, 6144)).astype(np.float32)
    weights = from_float32(values, "BF16")
    for bits in (2, 3, 4):
        rates: list[float] = []
        for quantize in (quantize_affine, quantize_search):
            quantize(weights[:1], "BF16", bits, 64)  # compiled, or loaded
            seconds: list[float] = []
            for _ in range(options.rounds):
                begin = time.thread_time()
                quantize(weights, "BF16", bits, 64)
                seconds.append(time.thread_time() - begin)
            rates.append(weights.size / min(seconds) / 1e6)
        print(f"{bits} bits g64: minmax {rates[0]:.0f}, search {rates[1]:.1f} M weights/s a core")


if __name__ == "__main__":
    main()
