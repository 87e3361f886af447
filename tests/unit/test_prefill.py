"""The memory that reading a prompt takes: computed from dims, held against MLX's own count."""

from importlib import import_module
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_map
from mlx_lm.generate import generate_step

from glm_quant.model.geometry import Geometry
from glm_quant.report import prefill
from glm_quant.report.memory import memory_need
from glm_quant.report.prefill import prefill_bytes
from tests.synthetic import small_config

CHUNK = 128
# Between 7 % too little and 20 % too much: MLX runs ahead of its own queue by some
# operations, differently each time, and a plan that promises too little is worse than one that
# promises too much.
LEAST, MOST = 0.93, 1.2

BASE = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "qk_head_dim": 128,
    "v_head_dim": 64,
    "index_n_heads": 8,
    "index_topk": 64,
    "moe_intermediate_size": 128,
    "vocab_size": 512,
}
SHAPES: dict[str, dict[str, int]] = {
    "balanced": {},
    "wide experts": {"hidden_size": 768, "num_experts_per_tok": 4},
    "many heads": {"num_attention_heads": 32, "num_key_value_heads": 32},
    "many indexer heads": {"index_n_heads": 32, "num_attention_heads": 4, "num_key_value_heads": 4},
}


def measured(config: dict[str, Any], context: int) -> tuple[int, int]:
    """MLX's active memory before, and its peak while mlx-lm reads a prompt and makes a token."""
    runtime = import_module("glm_quant.model.glm_moe_dsa")
    model = runtime.Model(runtime.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32)
    model.update(tree_map(lambda a: mx.random.normal(a.shape) * 0.02, model.parameters()))
    mx.eval(model.parameters())
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    prompt = mx.arange(context) % config["vocab_size"]
    for _ in generate_step(prompt, model, max_tokens=1, prefill_step_size=CHUNK):
        pass
    return before, mx.get_peak_memory()


@pytest.mark.parametrize("context", [100, 512])
@pytest.mark.parametrize("shape", SHAPES)
def test_computed_peaks_are_those_that_mlx_measures(
    shape: str, context: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, caches and prefill together, and prefill alone, below and above index_topk."""
    blocks = 1 << 18
    monkeypatch.setattr(import_module("glm_quant.model.glm_moe_dsa"), "BLOCK_ELEMENTS", blocks)
    config = small_config(layers=3, experts=4) | BASE | SHAPES[shape]
    geometry = Geometry.from_config(config)
    weights, peak = measured(config, context)
    need = memory_need(geometry, weights, -(-context // 256) * 256)
    cache = 2 * (need.latent_bytes + need.indexer_bytes)  # float32 here
    extra = prefill_bytes(geometry, context, chunk=CHUNK, item=4, block_elements=blocks)
    told = f"{shape}, {context}: measured {peak - weights - cache}, computed {extra}"
    print(told, f"whole {(weights + cache + extra) / peak:.2f}")
    assert LEAST < (weights + cache + extra) / peak < MOST, told


def test_blocks_and_chunks_are_those_of_runtime_and_mlx_lm() -> None:
    """Another bound there would make these figures wrong."""
    runtime = import_module("glm_quant.model.glm_moe_dsa")
    assert runtime.BLOCK_ELEMENTS == prefill.BLOCK_ELEMENTS
    assert generate_step.__kwdefaults__["prefill_step_size"] == prefill.CHUNK


@pytest.mark.parametrize("context", [1000, 5000, 40_000])
def test_the_largest_chunk_is_among_those_that_are_looked_at(context: int) -> None:
    """As if every chunk had been computed, to within a row of a block."""
    geometry = Geometry.from_config(small_config() | BASE)
    every = max(
        prefill._chunk_bytes(  # pyright: ignore[reportPrivateUsage]
            geometry, prefill.Chunk(past, min(512, context - past), 2, 1 << 22)
        )
        for past in range(0, context, 512)
    )
    found = prefill_bytes(geometry, context, chunk=512, block_elements=1 << 22)
    assert 0.98 * every <= found <= every
