"""Synthetic checkpoints of any size, in the release's layout: for benchmarks and quick tests.

`real_config` has the dims of GLM-5.2; `small_config` the same shape in miniature. Values are normal
with a standard deviation of 0.02, taken from one pool at a different place for each tensor, so that
a 20 GB checkpoint is written at the disk's speed. Nothing is held but the pool.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.header import ITEM_SIZE
from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.model.geometry import Geometry, Shape

_POOL_ELEMENTS = 1 << 22
_Entry = tuple[str, Shape, str]


def real_config(layers: int, experts: int, dense: int = 1) -> dict[str, Any]:
    """Return GLM-5.2's config with fewer layers and experts; every matrix has its real shape."""
    return small_config() | {
        "first_k_dense_replace": dense,
        "hidden_size": 6144,
        "index_head_dim": 128,
        "index_n_heads": 32,
        "index_topk": 2048,
        "indexer_types": _schedule(layers),
        "intermediate_size": 12288,
        "kv_lora_rank": 512,
        "max_position_embeddings": 1048576,
        "mlp_layer_types": _mlp_types(layers, dense),
        "moe_intermediate_size": 2048,
        "n_routed_experts": experts,
        "num_attention_heads": 64,
        "num_experts_per_tok": min(8, experts),
        "num_hidden_layers": layers,
        "num_key_value_heads": 64,
        "q_lora_rank": 2048,
        "qk_head_dim": 256,
        "qk_nope_head_dim": 192,
        "qk_rope_head_dim": 64,
        "rope_parameters": {"rope_theta": 8000000, "rope_type": "default"},
        "v_head_dim": 256,
        "vocab_size": 154880,
    }


def small_config(layers: int = 4, experts: int = 12) -> dict[str, Any]:
    """Return a config in miniature with every key of the release's."""
    return {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "dtype": "bfloat16",
        "eos_token_id": [0, 1, 2],
        "ep_size": 1,
        "first_k_dense_replace": 1,
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 128,
        "index_head_dim": 64,
        "index_n_heads": 32,
        "index_share_for_mtp_iteration": True,
        "index_skip_topk_offset": 3,
        "index_topk": 16,
        "index_topk_freq": 4,
        "index_topk_pattern": None,
        "indexer_rope_interleave": True,
        "indexer_types": _schedule(layers),
        "initializer_range": 0.02,
        "intermediate_size": 192,
        "kv_lora_rank": 64,
        "max_position_embeddings": 4096,
        "mlp_layer_types": _mlp_types(layers, 1),
        "model_type": "glm_moe_dsa",
        "moe_intermediate_size": 64,
        "moe_layer_freq": 1,
        "moe_router_dtype": "float32",
        "n_group": 1,
        "n_routed_experts": experts,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 4,
        "num_experts_per_tok": 2,
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "num_nextn_predict_layers": 1,
        "pad_token_id": 0,
        "pretraining_tp": 1,
        "q_lora_rank": 64,
        "qk_head_dim": 96,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "rms_norm_eps": 1e-05,
        "rope_interleave": True,
        "rope_parameters": {"rope_theta": 10000, "rope_type": "default"},
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 1,
        "topk_method": "noaux_tc",
        "transformers_version": "5.12.0",
        "use_cache": True,
        "v_head_dim": 64,
        "vocab_size": 256,
    }


def write_checkpoint(
    folder: Path, config: dict[str, Any], shard_bytes: int = 5 << 30, seed: int = 0
) -> None:
    """Write a checkpoint, greedily packed in lexicographic order of names as the release is.

    Args:
        folder: where; must not hold a checkpoint.
        config: from `real_config` or `small_config`.
        shard_bytes: largest payload of a shard.
        seed: another seed gives other values.
    """
    folder.mkdir(parents=True, exist_ok=True)
    geometry = Geometry.from_config(config)
    entries = sorted([*geometry.tensors(), *geometry.mtp_tensors()])
    packs = list(_pack(entries, shard_bytes))
    pool = _pool(seed)
    weight_map: dict[str, str] = {}
    total = 0
    for number, pack in enumerate(packs, start=1):
        shard = f"model-{number:05d}-of-{len(packs):05d}.safetensors"
        total += _write_shard(folder / shard, pack, pool)
        weight_map |= {name: shard for name, _, _ in pack}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2))
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (folder / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "eos_token_id": config["eos_token_id"]}, indent=2)
    )


def _schedule(layers: int) -> list[str]:
    return ["full" if max(layer - 2, 0) % 4 == 0 else "shared" for layer in range(layers)]


def _mlp_types(layers: int, dense: int) -> list[str]:
    return ["dense" if layer < dense else "sparse" for layer in range(layers)]


def _dtype(kind: str) -> str:
    return "F32" if kind == "F32" else "BF16"


def _bytes(shape: Shape, kind: str) -> int:
    return int(np.prod(shape)) * ITEM_SIZE[_dtype(kind)]


def _pack(entries: list[_Entry], limit: int) -> Iterator[list[_Entry]]:
    pack: list[_Entry] = []
    filled = 0
    for entry in entries:
        size = _bytes(entry[1], entry[2])
        if pack and filled + size > limit:
            yield pack
            pack, filled = [], 0
        pack.append(entry)
        filled += size
    yield pack


def _pool(seed: int) -> NDArray[np.uint16]:
    """Return normal values as bfloat16 bits: the upper half of a float32, rounded toward zero."""
    values = np.random.default_rng(seed).normal(0.0, 0.02, _POOL_ELEMENTS).astype(np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def _write_shard(path: Path, pack: list[_Entry], pool: NDArray[np.uint16]) -> int:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for name, shape, kind in pack:
        end = begin + _bytes(shape, kind)
        header[name] = {
            "dtype": _dtype(kind),
            "shape": list(shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape, kind in pack:
            for block in _values(name, int(np.prod(shape)), kind, pool):
                file.write(block.data)
    return begin


def _values(name: str, count: int, kind: str, pool: NDArray[np.uint16]) -> Iterator[NDArray[Any]]:
    """Yield a tensor's values: the pool from a place that the tensor's name decides."""
    start = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little") % pool.size
    if kind == "F32":
        yield (pool[np.arange(start, start + count) % pool.size].astype(np.uint32) << 16).view(
            np.float32
        )
        return
    if name.endswith("norm.weight"):
        yield np.full(count, 0x3F80, np.uint16)  # 1.0
        return
    while count > 0:
        block = pool[start : start + count]
        yield block
        count -= block.size
        start = 0
