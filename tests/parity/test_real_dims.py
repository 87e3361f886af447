"""One attention layer and one MoE layer of GLM-5.2's own dimensions, in float32 and bfloat16.

Weights are random and representable in bfloat16, so the float32 reference is the truth for both
dtypes. MLX's CPU backend computes a few GFLOP/s: our side takes the last rows of a context longer
than index_topk = 2,048, and gets the earlier rows as cached keys alone. Few experts, for memory.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import KVCache

from glm_quant.model import glm_moe_dsa as runtime
from glm_quant.parity.candidate import runnable, to_numpy
from glm_quant.parity.measures import mean_relative_error, overlap, relative_error

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[1] / "fixtures" / "glm-5.2" / "config.json"
LENGTH, ROWS = 2112, 24
EXPERTS, CHOSEN = 6, 3


@dataclass
class Layer:
    """A reference layer, its input, and what it made of it in float32 and in bfloat16."""

    config: dict[str, Any]
    weights: dict[str, mx.array]
    x: Any
    truth: Any
    rounded: Any
    topk: Any = None
    topk_rounded: Any = None


def release_config(**changes: Any) -> dict[str, Any]:
    own = {"num_hidden_layers": 1, "indexer_types": ["full"], "n_routed_experts": EXPERTS}
    kept = json.loads(CONFIG.read_text())
    for key in ("mlp_layer_types", "architectures"):
        kept.pop(key, None)
    return kept | own | {"num_experts_per_tok": CHOSEN} | changes


def fill(module: Any, seed: int) -> dict[str, mx.array]:
    """Give a module seeded weights that bfloat16 can hold; returns them for our side."""
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, meta in module.state_dict().items():
        value = torch.randn(meta.shape, generator=generator)
        if "norm" in name:
            value = 0.1 * value + (0 if name.endswith("bias") else 1)
        elif "e_score" in name:
            value = 0.01 * value
        else:
            value = value * meta.shape[-1] ** -0.5
        state[name] = value.bfloat16().float()
    module.load_state_dict(state, assign=True)
    return {name: mx.array(value.numpy()) for name, value in state.items()}


@pytest.fixture(scope="module")
def attention() -> Layer:
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as code

    values = release_config()
    config = transformers.GlmMoeDsaConfig.from_dict(values)
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        module = code.GlmMoeDsaAttention(config, 0)
    weights = fill(module, seed=0)
    x = torch.randn(1, LENGTH, 6144, generator=torch.Generator().manual_seed(1))
    x = x.bfloat16().float()
    rotary = code.GlmMoeDsaRotaryEmbedding(config)
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        module.to(dtype)
        mask = torch.full((LENGTH, LENGTH), torch.finfo(dtype).min, dtype=dtype).triu(1)
        with torch.no_grad():
            h = x.to(dtype)
            positions = rotary(h, torch.arange(LENGTH)[None])
            out, _, topk = module(h, positions, mask[None, None])
        results.append((out[0, -ROWS:].float().numpy(), topk[0, -ROWS:].numpy().astype(np.int64)))
    (truth, topk), (rounded, topk_rounded) = results
    return Layer(values, weights, x[0].numpy(), truth, rounded, topk, topk_rounded)


def our_attention(layer: Layer, dtype: mx.Dtype) -> tuple[Any, Any]:
    """Our layer's output and selection for the last rows, from a cache of the earlier ones."""
    model = runtime.Model.__new__(runtime.Model)
    args = runtime.ModelArgs.from_dict(layer.config)
    runtime.nn.Module.__init__(model)
    model.args = args
    prefix = "model.layers.0.self_attn."
    ours = model.sanitize({prefix + name: value for name, value in layer.weights.items()})
    module = runtime.Attention(args, "full")
    named = [(name.removeprefix(prefix), w.astype(dtype)) for name, w in ours.items()]
    module.load_weights(named, strict=True)
    x = mx.array(layer.x)[None].astype(dtype)
    before, last = x[:, :-ROWS], x[:, -ROWS:]
    cache = KVCache()
    latent, k_pe = mx.split(module.kv_a_proj_with_mqa(before)[:, None], [512], axis=-1)
    side = [module.rope(k_pe, 0), module.indexer.make_keys(before, 0)]
    cache.update_and_fetch(module.kv_a_layernorm(latent), mx.concatenate(side, axis=-1))
    out, topk = module(last, runtime.Span.of(cache), cache)
    assert topk is not None
    assert out.dtype == cache.keys.dtype == cache.values.dtype == dtype
    return to_numpy(out[0]), np.array(topk[0]).astype(np.int64)


def test_attention_in_float32(attention: Layer) -> None:
    """Within the suite's bound, and the same 2,048 of 2,112 keys."""
    out, topk = our_attention(attention, mx.float32)
    same = (np.sort(topk) == np.sort(attention.topk)).all(-1)
    assert same.sum() >= ROWS - 1  # one near tie of 24 x 2,048 choices would not surprise
    assert relative_error(out[same], attention.truth[same]) < 2e-5


def test_attention_in_bfloat16(attention: Layer) -> None:
    """On rows that select as float32 does, as near to it as transformers in bfloat16 is.

    A swapped key moves an average over 2,048 random values by 3 %, so swaps are counted apart: both
    implementations lose less than one key of 2,048 a row on average.
    """
    out, topk = our_attention(attention, mx.bfloat16)
    errors = []
    for values, chosen in ((out, topk), (attention.rounded, attention.topk_rounded)):
        assert 1 - overlap(chosen, attention.topk).mean() < 1 / 2048
        same = (np.sort(chosen) == np.sort(attention.topk)).all(-1)
        assert same.sum() >= ROWS // 3
        errors.append(mean_relative_error(values[same], attention.truth[same]))
    ours, theirs = errors
    assert ours < 1.25 * theirs, (ours, theirs)


@pytest.fixture(scope="module")
def moe() -> Layer:
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as code

    values = release_config(first_k_dense_replace=0)
    config = transformers.GlmMoeDsaConfig.from_dict(values)
    config._experts_implementation = "eager"
    with torch.device("meta"):
        module = code.GlmMoeDsaMoE(config)
    weights = fill(module, seed=2)
    x = torch.randn(1, ROWS, 6144, generator=torch.Generator().manual_seed(3)).bfloat16().float()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        module.to(dtype)
        # As `_keep_in_fp32_modules_strict` loads it.
        bias = torch.from_numpy(np.array(weights["gate.e_score_correction_bias"]))
        module.gate.e_score_correction_bias.data = bias
        with torch.no_grad():
            results.append(module(x.to(dtype))[0].float().numpy())
    return Layer(values, weights, x[0].numpy(), *results)


def our_moe(layer: Layer, dtype: mx.Dtype) -> Any:
    args = runtime.ModelArgs.from_dict(layer.config)
    module = runtime.MoE(args)
    ours = {k: v for k, v in layer.weights.items() if not k.startswith("experts.")}
    gate_up = layer.weights["experts.gate_up_proj"]
    # Apart, as a checkpoint has them: MLX 0.32's sorted gather_mm on CUDA misreads views.
    gate, up = map(mx.contiguous, mx.split(gate_up, 2, axis=1))
    ours |= {"switch_mlp.gate_proj.weight": gate, "switch_mlp.up_proj.weight": up}
    ours["switch_mlp.down_proj.weight"] = layer.weights["experts.down_proj"]
    kept = {k: v if "e_score" in k else v.astype(dtype) for k, v in ours.items()}
    module.load_weights(list(kept.items()), strict=True)
    out = runnable(module)(mx.array(layer.x)[None].astype(dtype))
    return to_numpy(out[0])


def test_moe_in_float32(moe: Layer) -> None:
    assert relative_error(our_moe(moe, mx.float32), moe.truth) < 2e-5


def test_moe_in_bfloat16(moe: Layer) -> None:
    """Experts in float32 on the CPU, whose GatherMM knows nothing else; the rest in bfloat16."""
    theirs = relative_error(moe.rounded, moe.truth)
    assert relative_error(our_moe(moe, mx.bfloat16), moe.truth) < 1.25 * theirs
