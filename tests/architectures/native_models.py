"""Small random checkpoints under mlx-lm's own parameter names, for every model of mlx-lm.

A model class of mlx-lm takes the tensors of its own builds, so its parameters make a checkpoint of
architectures that transformers does not have. Dims are guessed from the names of the arguments.
"""

import dataclasses
import json
import pkgutil
import re
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm.models
from mlx.utils import tree_flatten

from glm_quant.architectures.architecture import mlx_lm_classes

_FULL = ["full_attention"] * 4
_ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
_DIMS: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "max_position_embeddings": 512,
}  # fmt: skip
_MLA: dict[str, Any] = {
    "q_lora_rank": 32, "kv_lora_rank": 64, "qk_nope_head_dim": 32, "qk_rope_head_dim": 32,
    "v_head_dim": 32,
}  # fmt: skip
_DEEPSEEK: dict[str, Any] = _DIMS | _MLA | {
    "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1,
    "topk_group": 1, "moe_intermediate_size": 64, "first_k_dense_replace": 1, "topk_method":
    "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True,
}  # fmt: skip
_KDA: dict[str, Any] = {
    "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 32, "num_heads": 2,
    "short_conv_kernel_size": 4,
}  # fmt: skip
_KIMI_LINEAR: dict[str, Any] = _DIMS | _MLA | {
    "linear_attn_config": _KDA, "num_experts": 8, "num_experts_per_token": 2,
    "num_shared_experts": 1, "moe_intermediate_size": 64, "first_k_dense_replace": 1,
    "model_max_length": 512,
}  # fmt: skip
_LLAMA4_TEXT: dict[str, Any] = _DIMS | {
    "attention_bias": False, "attention_chunk_size": 128, "interleave_moe_layer_step": 2,
    "intermediate_size_mlp": 128, "num_experts_per_tok": 1, "num_local_experts": 8,
    "rope_scaling": None, "use_qk_norm": False, "model_type": "llama4_text",
}  # fmt: skip
_GEMMA3N: dict[str, Any] = _DIMS | {
    "model_type": "gemma3n_text", "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 256,
    "sliding_window": 16, "rope_local_base_freq": 10000.0, "final_logit_softcapping": 30.0,
    "layer_types": ["sliding_attention", "full_attention"] * 2, "laurel_rank": 16,
    "activation_sparsity_pattern": [0.0] * 4, "hidden_size_per_layer_input": 16,
    "altup_num_inputs": 2, "altup_coef_clip": 120.0, "altup_correct_scale": True,
    "altup_active_idx": 0, "intermediate_size": 128,
}  # fmt: skip
_QWEN3_VL: dict[str, Any] = _DIMS | {
    "model_type": "qwen3", "tie_word_embeddings": False, "rope_scaling": None,
}  # fmt: skip
_QWEN3_MOE: dict[str, Any] = _DIMS | {
    "model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "moe_intermediate_size": 64, "norm_topk_prob": True,
    "tie_word_embeddings": False, "max_position_embeddings": 512,
}  # fmt: skip
_QWEN3_NEXT: dict[str, Any] = _QWEN3_MOE | {
    "model_type": "qwen3_next", "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 4,
    "shared_expert_intermediate_size": 64, "partial_rotary_factor": 0.5,
    "full_attention_interval": 4,
}  # fmt: skip
_GRANITE: dict[str, Any] = _DIMS | {
    "layer_types": ["mamba", "attention"] * 2, "mamba_n_heads": 4, "mamba_d_head": 32,
    "mamba_proj_bias": False, "mamba_d_state": 32, "mamba_d_conv": 4, "mamba_n_groups": 1,
    "mamba_conv_bias": True, "num_local_experts": 8, "num_experts_per_tok": 2,
    "shared_intermediate_size": 64, "attention_bias": False,
}  # fmt: skip
# What cannot be guessed.
SPECIAL: dict[str, dict[str, Any]] = {
    "Klear": {"mlp_only_layers": [], "decoder_sparse_step": 1},
    "afmoe": {"layer_types": _FULL},
    "baichuan_m1": {"sliding_window_layers": [1], "conv_window": 2},
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 128, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "deepseek_v2": _DEEPSEEK | {"rope_scaling": {
        "type": "yarn", "factor": 4, "mscale": 1.0, "mscale_all_dim": 1.0, "beta_fast": 32,
        "beta_slow": 1, "original_max_position_embeddings": 128,
    }},
    "exaone4": {"rope_scaling": None, "sliding_window_pattern": "LLLG", "sliding_window": 16},
    "exaone_moe": {"layer_types": _FULL, "is_moe_layer": [False, True, True, True]},
    "gemma3": {"text_config": _DIMS | {"model_type": "gemma3_text"}, "vocab_size": 256},
    "gemma3n": {"text_config": _GEMMA3N},
    "glm_moe_dsa": _DEEPSEEK | {
        "index_n_heads": 2, "index_head_dim": 64, "index_topk": 8, "rope_parameters": _ROPE,
        "moe_layer_freq": 1, "rope_scaling": None, "attention_bias": False,
        "routed_scaling_factor": 1.0,
    },
    "granitemoehybrid": _GRANITE,
    "hunyuan": {"rope_scaling": {"type": "dynamic", "alpha": 1.0, "factor": 1.0}, "moe_topk": 2},
    "jamba": {"layers_block_type": ["mamba", "attention"] * 2, "mamba_dt_rank": 8},
    "kimi_k25": {"text_config": _DEEPSEEK | {"model_type": "kimi_k2"}},
    "kimi_k3": {"text_config": _KIMI_LINEAR | {"attn_res_block_size": 2}},
    "kimi_linear": _KIMI_LINEAR,
    "kimi_vl": {"text_config": _DEEPSEEK},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_dim": 64},
    "lfm2-vl": {"text_config": _DIMS | {
        "model_type": "lfm2", "layer_types": ["conv", "full_attention"] * 2, "block_dim": 64,
        "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_multiple_of": 32,
        "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "block_ff_dim": 128,
    }},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "llama4": {"text_config": _LLAMA4_TEXT},
    "llama4_text": {"no_rope_layers": [1, 1, 1, 0]},
    "mellum": {"layer_types": _FULL, "rope_parameters": {"full_attention": _ROPE}},
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0, 1, 1, 0], "moe_layer_freq": [0, 1, 1, 1],
        "partial_rotary_factor": 1, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    },
    "minicpm3": {"rope_scaling": {
        "short_factor": [1.0] * 16, "long_factor": [1.0] * 16,
        "original_max_position_embeddings": 128, "type": "longrope",
    }},
    "minimax_m3_vl": {"text_config": _DIMS | {
        "dense_intermediate_size": 128, "shared_intermediate_size": 64, "num_local_experts": 8,
        "num_experts_per_tok": 2, "rotary_dim": 16, "intermediate_size": 64,
    }},
    "ministral3": {"rope_parameters": _ROPE | {
        "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 128,
    }},
    "mistral3": {"text_config": _DIMS | {"model_type": "llama", "tie_word_embeddings": False}},
    "muse_spark": {"text_config": _DIMS | {
        "post_norm_eps": 1e-6, "rope_parameters": _ROPE, "layer_rope_theta": [10000.0] * 3 + [0],
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"], "sliding_window": 8,
        "final_logit_softcapping": 20.0, "output_multiplier": 0.2, "num_local_experts": 8,
        "num_experts_per_tok": 2, "moe_hidden_size": 64, "moe_intermediate_size": 64,
    }},
    "nemotron-nas": {"block_configs": [{
        "attention": {"n_heads_in_group": 1, "no_op": False, "replace_with_linear": False},
        "ffn": {"ffn_mult": 2.0, "no_op": False, "replace_with_linear": False},
    }] * 4},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "-", "E"], "n_group": 1, "topk_group": 1},
    "openelm": {
        "num_transformer_layers": 2, "num_query_heads": [2, 2], "num_kv_heads": [2, 2],
        "ffn_multipliers": [2.0, 2.0], "ffn_dim_divisor": 32, "model_dim": 64,
    },
    "pixtral": {"text_config": _DIMS | {"model_type": "llama", "tie_word_embeddings": False}},
    "plamo": {"n_shared_head": 1},
    "qwen2_vl": {"text_config": _DIMS | {"model_type": "qwen2", "tie_word_embeddings": False}},
    "qwen3": {"rope_theta": 10000.0},
    "qwen3_5": {"text_config": _QWEN3_NEXT | {"model_type": "qwen3_5", "num_experts": 0}},
    "qwen3_5_moe": {"text_config": _QWEN3_NEXT | {"model_type": "qwen3_5_moe"}},
    "qwen3_moe": _QWEN3_MOE,
    "qwen3_next": _QWEN3_NEXT,
    "qwen3_vl": {"text_config": _QWEN3_VL},
    "qwen3_vl_moe": {"text_config": _QWEN3_MOE},
    "recurrent_gemma": {
        "block_types": ["recurrent", "recurrent", "attention"], "lru_width": 64,
        "attention_window_size": 16, "logits_soft_cap": 30.0,
    },
    "spark2_5": {"layer_types": _FULL, "rope_parameters": {"full_attention": _ROPE}},
}  # fmt: skip
_GUESSES: tuple[tuple[str, Any], ...] = (
    (r"vocab", 256),
    (r"layer_types", None),
    (r"layers?$|depth", 4),
    (r"heads?$|groups?$|head_kv|multi_query", 2),
    (r"experts?$", 8),
    (r"topk|top_k|per_tok", 2),
    (r"eps", 1e-5),
    (r"theta", 10000.0),
    (r"intermediate|ffn|inner", 128),
    (r"hidden|d_model|model_dim|embd|n_embed", 64),
    (r"head_dim|rank|_dim$|state", 32),
    (r"positions?|length|context|window", 512),
)
_MOST_PARAMETERS = 40_000_000


def model_names() -> list[str]:
    """Return the names of mlx-lm's modules that have a model class."""
    folder = Path(mlx_lm.models.__path__[0])
    return [
        module.name
        for module in pkgutil.iter_modules(mlx_lm.models.__path__)
        if "class Model(" in (folder / f"{module.name}.py").read_text(encoding="utf-8")
    ]


def make_native_checkpoint(name: str, folder: Path) -> None:
    """Write a random checkpoint of one of mlx-lm's models under its own parameter names."""
    model_class, arguments = mlx_lm_classes({"model_type": name})
    config = _config(name, arguments)
    model = model_class(arguments.from_dict(config))
    parameters = dict(tree_flatten(model.parameters()))
    if sum(value.size for value in parameters.values()) > _MOST_PARAMETERS:
        raise ValueError(f"{name} is too large for a small checkpoint")
    mx.random.seed(0)
    weights = {
        key: (mx.random.normal(value.shape) * 0.08).astype(mx.bfloat16)
        if mx.issubdtype(value.dtype, mx.floating)
        else mx.random.randint(0, 255, value.shape).astype(value.dtype)
        for key, value in parameters.items()
    }
    folder.mkdir(parents=True, exist_ok=True)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(config))


def _config(name: str, arguments: Any) -> dict[str, Any]:
    config: dict[str, Any] = {"model_type": name, "torch_dtype": "bfloat16"}
    for field in dataclasses.fields(arguments):
        required = field.default is dataclasses.MISSING
        required = required and field.default_factory is dataclasses.MISSING
        dim = isinstance(field.default, int) and not isinstance(field.default, bool)
        if field.name != "model_type" and (required or (dim and _is_dim(field.name))):
            config[field.name] = _guess(field.name, str(field.type))
    return config | SPECIAL.get(name, {})


def _is_dim(name: str) -> bool:
    pattern = r"layers?$|heads$|hidden|intermediate|vocab|experts$|rank$|_dim$|d_model|embd"
    return name in _DIMS or bool(re.search(pattern, name))


def _guess(name: str, kind: str) -> Any:
    if name in _DIMS:
        return _DIMS[name]
    for pattern, value in _GUESSES:
        if re.search(pattern, name):
            return value
    if "bool" in kind:
        return False
    if "float" in kind:
        return 1.0
    return 4 if "int" in kind and "Dict" not in kind and "List" not in kind else None
