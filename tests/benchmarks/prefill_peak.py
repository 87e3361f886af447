"""The memory that reading a prompt takes, at GLM-5.2's real dims: computed, and MLX's own count.

    uv run python -m tests.benchmarks.prefill_peak

One layer with the release's attention and indexer in float32, small in what the largest temporary
does not depend on: the dense MLP, and the vocabulary. mlx-lm reads the prompt in its own chunks.
"""

import argparse
import json
from importlib import import_module

import mlx.core as mx
from mlx.utils import tree_map
from mlx_lm.generate import generate_step

from glm_quant.model.geometry import Geometry
from glm_quant.report.memory import memory_need
from glm_quant.report.prefill import prefill_bytes
from glm_quant.testbed.synthetic import real_config

ONE_LAYER = {
    "num_hidden_layers": 1,
    "first_k_dense_replace": 1,
    "indexer_types": ["full"],
    "mlp_layer_types": ["dense"],
    "num_nextn_predict_layers": 0,
    "intermediate_size": 1024,
    "vocab_size": 512,
}


def main() -> None:
    """Measure and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--contexts", type=int, nargs="+", default=[2048, 4096])
    contexts = parser.parse_args().contexts
    config = real_config(1, 8) | ONE_LAYER
    geometry = Geometry.from_config(config)
    runtime = import_module("glm_quant.model.glm_moe_dsa")
    model = runtime.Model(runtime.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32)
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.02, model.parameters()))
    mx.eval(model.parameters())
    found: dict[str, object] = {"device": str(mx.default_device())}
    for context in contexts:
        mx.clear_cache()
        weights = mx.get_active_memory()
        mx.reset_peak_memory()
        prompt = mx.arange(context) % config["vocab_size"]
        for _ in generate_step(prompt, model, max_tokens=1):
            pass
        need = memory_need(geometry, weights, -(-context // 256) * 256)
        computed = 2 * (need.latent_bytes + need.indexer_bytes)  # float32 here
        computed += prefill_bytes(geometry, context, item=4)
        peak = mx.get_peak_memory() - weights
        found[str(context)] = {
            "measured_bytes": peak,
            "computed_bytes": computed,
            "ratio": round(computed / peak, 3),
        }
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
