"""Writes a trained small model as a release: names, shards, dtypes, config, tokenizer, licence.

Everything here copies the shape of zai-org/GLM-5.2: names packed greedily in lexicographic order,
so layers and experts come as 0, 1, 10, 11, 2 …; one tensor an expert; BF16 but for the F32 routing
bias; the MTP layer stored at index `num_hidden_layers`. Only the byte limit of a shard is smaller,
chosen so that experts of a layer, and the three matrices of some expert, lie in different shards.
"""

import json
import re
import sysconfig
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from dev.text import CHAT_TEMPLATE, EOS_TOKENS, SPECIAL_TOKENS
from dev.tiny_model import Params, TinyShape

SHARD_LIMIT = 1_740_000
"""Bytes of tensors in one shard; the release uses 5 GiB."""
MAX_POSITIONS = 4096
TRANSFORMERS_VERSION = "5.12.0"
"""As the release's config.json says; the files follow that version's layout."""

_EXPERTS = re.compile(r"(.*\.mlp\.experts)\.(gate|up|down)_proj\.weight")


def release_tensors(shape: TinyShape, params: Params) -> dict[str, Tensor]:
    """Split joined experts and round to the release's dtypes, in lexicographic order of names."""
    tensors: dict[str, Tensor] = {}
    for name, value in params.items():
        value = value.detach()
        match = _EXPERTS.fullmatch(name)
        if name.endswith("e_score_correction_bias"):
            tensors[name] = value.float()
        elif match is None:
            tensors[name] = value.bfloat16()
        else:
            axis = 1 if match[2] == "down" else 0
            for expert, part in enumerate(value.chunk(shape.n_routed_experts, dim=axis)):
                tensors[f"{match[1]}.{expert}.{match[2]}_proj.weight"] = part.bfloat16()
    return {name: tensors[name].contiguous() for name in sorted(tensors)}


def pack_shards(tensors: dict[str, Tensor], limit: int = SHARD_LIMIT) -> list[dict[str, Tensor]]:
    """Fill shards in the given order; the tensor that would pass the limit opens a new one."""
    shards: list[dict[str, Tensor]] = [{}]
    used = 0
    for name, value in tensors.items():
        if shards[-1] and used + value.nbytes > limit:
            shards.append({})
            used = 0
        shards[-1][name] = value
        used += value.nbytes
    return shards


def release_config(shape: TinyShape, eos_ids: list[int]) -> dict[str, Any]:
    """Build `config.json` with the release's keys."""
    s, layers = shape, range(shape.num_hidden_layers)
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": eos_ids,
        "ep_size": 1,
        "first_k_dense_replace": s.first_k_dense_replace,
        # The release gives the query's unrotated width here; transformers replaces it on load.
        "head_dim": s.qk_nope_head_dim,
        "hidden_act": "silu",
        "hidden_size": s.hidden_size,
        "index_head_dim": s.index_head_dim,
        "index_n_heads": s.index_n_heads,
        "index_share_for_mtp_iteration": True,
        "index_skip_topk_offset": s.index_skip_topk_offset,
        "index_topk": s.index_topk,
        "index_topk_freq": s.index_topk_freq,
        "index_topk_pattern": None,
        "indexer_rope_interleave": True,
        "indexer_types": ["full" if s.is_full(layer) else "shared" for layer in layers],
        "initializer_range": 0.02,
        "intermediate_size": s.intermediate_size,
        "kv_lora_rank": s.kv_lora_rank,
        "max_position_embeddings": MAX_POSITIONS,
        "mlp_layer_types": ["dense" if s.is_dense(layer) else "sparse" for layer in layers],
        "model_type": "glm_moe_dsa",
        "moe_intermediate_size": s.moe_intermediate_size,
        "moe_layer_freq": 1,
        "moe_router_dtype": "float32",
        "n_group": 1,
        "n_routed_experts": s.n_routed_experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": s.num_attention_heads,
        "num_experts_per_tok": s.num_experts_per_tok,
        "num_hidden_layers": s.num_hidden_layers,
        "num_key_value_heads": s.num_attention_heads,
        "num_nextn_predict_layers": 1,
        "pad_token_id": eos_ids[0],
        "pretraining_tp": 1,
        "q_lora_rank": s.q_lora_rank,
        "qk_head_dim": s.qk_head_dim,
        "qk_nope_head_dim": s.qk_nope_head_dim,
        "qk_rope_head_dim": s.qk_rope_head_dim,
        "rms_norm_eps": s.rms_norm_eps,
        "rope_interleave": True,
        "rope_parameters": {"rope_theta": s.rope_theta, "rope_type": "default"},
        "routed_scaling_factor": s.routed_scaling_factor,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "transformers_version": TRANSFORMERS_VERSION,
        "use_cache": True,
        "v_head_dim": s.v_head_dim,
        "vocab_size": s.vocab_size,
    }


def write_release(output: Path, shape: TinyShape, params: Params, tokenizer: Any) -> None:
    """Write the whole checkpoint folder.

    Args:
        output: Folder to fill; shards that an earlier run left there are removed.
        shape: The model's dimensions.
        params: Its parameters, experts joined.
        tokenizer: The trained `tokenizers.Tokenizer`.
    """
    output.mkdir(parents=True, exist_ok=True)
    for stale in output.glob("model*.safetensors"):
        stale.unlink()
    shards = pack_shards(release_tensors(shape, params))
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, output / file, metadata={"format": "pt"})
        # safetensors makes files that only their owner may read.
        (output / file).chmod(0o644)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(value.nbytes for shard in shards for value in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    # The release's index ends without a newline; its config ends with one.
    (output / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    eos_ids = [tokenizer.token_to_id(token) for token in EOS_TOKENS]
    _write_json(output / "config.json", release_config(shape, eos_ids))
    _write_json(
        output / "generation_config.json",
        {
            "_from_model_config": True,
            "eos_token_id": eos_ids,
            "pad_token_id": eos_ids[0],
            "temperature": 1.0,
            "top_p": 0.95,
            "transformers_version": TRANSFORMERS_VERSION,
        },
    )
    _write_tokenizer(output, tokenizer)
    _write_licence(output)


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _write_tokenizer(output: Path, tokenizer: Any) -> None:
    tokenizer.save(str(output / "tokenizer.json"), pretty=False)
    _write_json(
        output / "tokenizer_config.json",
        {
            "additional_special_tokens": list(SPECIAL_TOKENS),
            "clean_up_tokenization_spaces": False,
            "do_lower_case": False,
            "eos_token": EOS_TOKENS[0],
            "model_max_length": MAX_POSITIONS,
            "pad_token": EOS_TOKENS[0],
            "padding_side": "left",
            "remove_space": False,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    (output / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


_NOTICE = """\
This checkpoint was trained from scratch on the sources and docstrings of Python's standard library,
Copyright (c) 2001 Python Software Foundation; All Rights Reserved, under the licence in LICENSE. It
is a test object of the glm-quant project. It contains no weights and no text of GLM-5.2; it shares
that model's architecture, tensor names and file layout. How it was made and what it reaches is
recorded in training.json.
"""


def _write_licence(output: Path) -> None:
    """Put the licence of the training text beside the weights."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    (output / "LICENSE").write_text(
        (stdlib / "LICENSE.txt").read_text(encoding="utf-8"), encoding="utf-8"
    )
    (output / "NOTICE").write_text(_NOTICE, encoding="utf-8")
