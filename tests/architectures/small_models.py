"""Small random checkpoints of many architectures, saved as transformers saves them.

One table of small dims serves all: whatever of it an architecture's config class has is set. The
config is completed with the keys that mlx-lm's model class reads and transformers 5 no longer
writes, as vendors' own configs have them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from mlx_lm import utils as mlx_lm_utils

DIMS: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 256,
    "max_position_embeddings": 512,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 64,
    "shared_intermediate_size": 64,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "q_lora_rank": 32,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_topk": 8,
    "sliding_window": 16,
    "n_group": 1,
    "topk_group": 1,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 2,
    "n_positions": 512,
    "n_inner": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_attention_heads": 2,
    "num_heads": 2,
    "out_hidden_size": 64,
}
# What a config class has under another name, or must have otherwise than in the table.
SPECIAL: dict[str, dict[str, Any]] = {
    "cohere2": {"num_attention_heads": 2, "head_dim": 32},
    "dots1": {"n_group": 1, "topk_group": 1, "n_shared_experts": 1},
    "falcon_h1": {
        "mamba_d_ssm": 64, "mamba_n_heads": 2, "mamba_d_head": 32, "mamba_d_state": 32,
        "mamba_n_groups": 1,
    },
    "gpt2": {"n_inner": 256},
    "gpt_neox": {"intermediate_size": 256},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"], "mamba_n_heads": 4,
        "mamba_d_head": 32, "mamba_d_state": 32, "mamba_n_groups": 1,
    },
    "jamba": {"mamba_d_state": 16, "mamba_dt_rank": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 256, "hidden_size_per_layer_input": 16},
    "lfm2_moe": {
        "num_dense_layers": 1, "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "longcat_flash": {
        "zero_expert_num": 0, "num_layers": 2, "ffn_hidden_size": 128, "expert_ffn_hidden_size": 64,
    },
    "mamba": {"state_size": 16, "time_step_rank": 8},
    "mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 32, "n_groups": 1},
    "recurrent_gemma": {"lru_width": 64, "attention_window_size": 16},
}  # fmt: skip
# Keys of vendors' configs that transformers' classes do not have.
VENDOR: dict[str, dict[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "bailing_hybrid": {"group_norm_size": 1},
    "exaone_moe": {"is_moe_layer": [False, True, True, True]},
    "gemma3": {"vocab_size": 256},
    "glm_moe_dsa": {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1},
    "gpt2": {"n_ctx": 512},
    "longcat_flash": {
        "attention_method": "MLA", "zero_expert_type": "identity", "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
    },
    "kimi_linear": {
        "rope_theta": 10000.0,
        "linear_attn_config": {
            "full_attn_layers": [4], "kda_layers": [1, 2, 3], "head_dim": 32, "num_heads": 2,
            "short_conv_kernel_size": 4,
        },
    },
    "lfm2": {"block_dim": 64},
    "minicpm3": {"rope_scaling": None},
    "qwen3_vl": {"tie_word_embeddings": False},
    "qwen3_vl_moe": {"tie_word_embeddings": False},
    "minimax_m2": {"rotary_dim": 16, "shared_intermediate_size": 64},
}  # fmt: skip
_ALIASES = {"rotary_pct": "partial_rotary_factor", "rotary_emb_base": "rope_theta"}
_MOST_PARAMETERS = 40_000_000


def make_small_checkpoint(model_type: str, folder: Path) -> None:
    """Write a random checkpoint of an architecture that transformers and mlx-lm both have."""
    config = transformers.CONFIG_MAPPING[model_type](**_small(model_type))
    torch.manual_seed(0)
    model = _model(config)
    if sum(parameter.numel() for parameter in model.parameters()) > _MOST_PARAMETERS:
        raise ValueError(f"{model_type} is too large for a small checkpoint")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
            elif "norm" in name:
                parameter.normal_(1, 0.05)
    model.save_pretrained(folder)
    _complete(folder / "config.json", model_type, config)


def _small(model_type: str) -> dict[str, Any]:
    default = transformers.CONFIG_MAPPING[model_type]()
    text = getattr(default, "text_config", None)
    if text is None:
        return _of_table(default, DIMS) | SPECIAL.get(model_type, {})
    dims: dict[str, Any] = {"text_config": _of_table(text, DIMS) | {"model_type": text.model_type}}
    vision = getattr(default, "vision_config", None)
    if vision is not None:
        dims["vision_config"] = _of_table(vision, VISION) | {"model_type": vision.model_type}
    return dims | SPECIAL.get(model_type, {})


def _of_table(config: Any, table: dict[str, Any]) -> dict[str, Any]:
    known = set(dir(type(config))) | set(config.to_dict())
    dims = {key: value for key, value in table.items() if key in known}
    layer_types = config.to_dict().get("layer_types")
    if layer_types:
        dims["layer_types"] = (list(layer_types) * 4)[: DIMS["num_hidden_layers"]]
    return dims


def _model(config: Any) -> Any:
    for family in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
        try:
            return getattr(transformers, family).from_config(config, dtype=torch.bfloat16)
        except ValueError as error:
            if "Unrecognized configuration class" not in str(error):
                raise
    raise ValueError(f"transformers has no language model for {config.model_type}")


def _complete(path: Path, model_type: str, config: Any) -> None:
    saved = json.loads(path.read_text())
    saved |= {"model_type": model_type, "torch_dtype": "bfloat16"} | VENDOR.get(model_type, {})
    _fill(saved, config)
    if "text_config" in saved and getattr(config, "text_config", None) is not None:
        saved["text_config"] |= VENDOR.get(model_type, {})
        _fill(saved["text_config"], config.text_config)
    path.write_text(json.dumps(saved, indent=1, default=str))


def _fill(saved: dict[str, Any], config: Any) -> None:
    """Add what mlx-lm's arguments class reads, from the config object and its rope parameters."""
    try:
        _, arguments = mlx_lm_utils._get_classes(saved)
    except ValueError:
        return
    rope: dict[str, Any] = {}
    parameters = getattr(config, "rope_parameters", None) or {}
    for entry in [*parameters.values(), parameters]:
        if isinstance(entry, dict):
            rope |= {key: value for key, value in entry.items() if not isinstance(value, dict)}
    for field in dataclasses.fields(arguments):
        if saved.get(field.name) is not None or field.name.endswith("_config"):
            continue
        name = _ALIASES.get(field.name, field.name)
        if name == "rope_scaling":
            saved[name] = None
            continue
        value = getattr(config, name, None)
        value = rope.get(name) if value is None else value
        if value is None and field.default is dataclasses.MISSING:
            value = DIMS.get(name)
        if value is not None and not callable(value):
            saved[field.name] = value
