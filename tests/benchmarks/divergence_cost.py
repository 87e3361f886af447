"""What streamed KL of GLM-5.2 costs: bytes and arithmetic from its dims, seconds from real layers.

    uv run python tests/benchmarks/divergence_cost.py --config PATH/GLM-5.2/config.json

A dense and two MoE layers with GLM-5.2's real dims and few experts are streamed with few and with
more tokens; what grows with the tokens and what does not is taken apart by the two, and the experts
that are missing are added at the measured price of one. Sequences are short, so the selection of
keys past index_topk is not in the seconds.
"""

import argparse
import json
import shutil
import tempfile
import time
from math import prod
from pathlib import Path

import mlx.core as mx
import numpy as np

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.evaluation.compare import compare_states, targets_of
from glm_quant.model.geometry import Geometry
from glm_quant.streaming.forward import stream_states
from glm_quant.streaming.memory_plan import disk_bytes, plan_memory
from glm_quant.streaming.weights import SourceWeights
from tests.synthetic import real_config, write_checkpoint

LAYERS = 3


def flops_per_token(geometry: Geometry) -> float:
    """Return the multiply-adds, times two, of the matrices that a token passes."""
    share = geometry.num_experts_per_tok / geometry.n_routed_experts
    return sum(
        2 * prod(shape) * (share if ".mlp.experts." in name else 1)
        for name, shape, _ in geometry.tensors()
        if len(shape) == 2 and "embed_tokens" not in name
    )


def layer_seconds(weights: SourceWeights, tokens: int, folder: Path) -> list[float]:
    """Stream one sequence; returns the seconds of each layer."""
    geometry = Geometry.from_config(weights.checkpoint.config)
    plan = plan_memory(geometry, [tokens], 16 << 30, weights.runtime.BLOCK_ELEMENTS)
    marks: list[float] = []
    ids = np.random.default_rng(0).integers(0, geometry.vocab_size, tokens)
    weights.embed(ids)  # files are in the system's cache from here on
    begin = time.perf_counter()
    mx.reset_peak_memory()
    stream_states(weights, [ids], plan, folder, lambda _d, _t: marks.append(time.perf_counter()))
    peak = mx.get_peak_memory()
    if peak > plan.total_bytes:
        raise SystemExit(f"{peak:,} bytes were allocated, {plan.total_bytes:,} were planned")
    return [after - before for before, after in zip([begin, *marks], marks, strict=False)]


def main() -> None:
    """Measure and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, required=True, help="config.json of the release")
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--tokens", type=int, nargs=2, default=(32, 160))
    parser.add_argument("--total", type=int, default=16384, help="tokens to extrapolate to")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure")
    chosen = parser.parse_args()
    release = Geometry.from_config(json.loads(chosen.config.read_text()))
    work = Path(tempfile.mkdtemp(prefix="divergence-cost-", dir=chosen.work))
    try:
        config = real_config(LAYERS, chosen.experts) | {"num_nextn_predict_layers": 0}
        write_checkpoint(work / "source", config)
        weights = SourceWeights(Checkpoint.open(work / "source"))
        layer_seconds(weights, 8, work / "warm")
        few, many = chosen.tokens
        runs = {n: layer_seconds(weights, n, work / str(n)) for n in (few, many)}
        begin = time.perf_counter()
        for _, matrices in weights.experts(1, range(chosen.experts)):
            mx.eval(matrices)
        expert = (time.perf_counter() - begin) / chosen.experts

        def price(seconds: dict[int, float]) -> tuple[float, float]:
            each = max(seconds[many] - seconds[few], 0.0) / (many - few)
            return max(seconds[few] - each * few, 0.0), each

        dense = price({n: run[0] for n, run in runs.items()})
        moe = price({n: min(run[1:]) for n, run in runs.items()})
        ids = np.random.default_rng(1).integers(0, release.vocab_size, many)
        states = np.random.default_rng(2).normal(size=(many, 6144)).astype(np.float32)
        begin = time.perf_counter()
        compare_states((weights, states), (weights, states), targets_of([ids]))
        compared = time.perf_counter() - begin
        more = release.n_routed_experts - chosen.experts
        layers_of = {
            "dense": release.first_k_dense_replace,
            "moe": release.num_hidden_layers - release.first_k_dense_replace,
        }
        fixed = layers_of["dense"] * dense[0] + layers_of["moe"] * (moe[0] + more * expert)
        each = layers_of["dense"] * dense[1] + layers_of["moe"] * moe[1]
        stored = sum(prod(s) * (4 if kind == "F32" else 2) for _, s, kind in release.tensors())
        plan = plan_memory(release, [4096], 1 << 40, weights.runtime.BLOCK_ELEMENTS)
        result = {
            "source_bytes_read": stored,
            "tflop_per_token": flops_per_token(release) / 1e12,
            "state_bytes_on_disk": disk_bytes(release, chosen.total),
            "memory_bytes": plan.fixed_bytes + plan.token_bytes * chosen.total,
            "measured": {
                "device": str(mx.default_device()),
                "layer_seconds": {str(n): [round(s, 2) for s in run] for n, run in runs.items()},
                "expert_seconds": round(expert, 4),
                "compare_seconds": {str(many): round(compared, 2)},
            },
            "extrapolated_pass": {
                "tokens": chosen.total,
                "weights_seconds": round(fixed),
                "tokens_seconds": round(each * chosen.total),
            },
        }
        print(json.dumps(result, indent=2))
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
