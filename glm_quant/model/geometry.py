"""The tensors that a GLM config implies: every name, shape and dtype, before any weight is read.

Names and shapes are those of the zai-org/GLM-5.2 release (59,585 tensors); dims in brackets are the
config's own keys. A checkpoint that disagrees with its config is caught here, not by a runtime.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from glm_quant.checkpoint.header import shorten
from glm_quant.errors import CheckpointError

ARCHITECTURE = "glm_moe_dsa"

Shape = tuple[int, ...]


def is_glm(config: Mapping[str, Any]) -> bool:
    """Whether a config is of the architecture that this package has a runtime of its own for."""
    return config.get("model_type") == ARCHITECTURE


@dataclass(frozen=True)
class Geometry:
    """The dims of a `glm_moe_dsa` model, under their config names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    moe_intermediate_size: int
    num_hidden_layers: int
    num_nextn_predict_layers: int
    first_k_dense_replace: int
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    indexer_types: tuple[str, ...]
    tie_word_embeddings: bool

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Geometry":
        """Read the dims.

        Raises:
            CheckpointError: another architecture, or a dim that is missing or no natural number.
        """
        model_type = config.get("model_type")
        if model_type != ARCHITECTURE:
            raise CheckpointError(
                f"config.json: model_type is {shorten(model_type)}; this converter makes "
                f"{ARCHITECTURE!r} (GLM-5, 5.1, 5.2, 5.3). Use mlx_lm.convert for other models."
            )
        dims: dict[str, int] = {}
        for key, default in _DIMS.items():
            value = config.get(key, default)
            least = 0 if key in _MAY_BE_ZERO else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise CheckpointError(
                    f"config.json: {key} is {shorten(value)}, a whole number of at least {least} "
                    "is needed. Fetch config.json again."
                )
            if value > (_MAX_COUNT if key in _COUNTS else _MAX_DIM):
                raise CheckpointError(
                    f"config.json: {key} is {value:,}, beyond any real model. Fetch config.json "
                    "again."
                )
            dims[key] = value
        geometry = cls(
            **dims,
            indexer_types=_indexer_types(config, dims["num_hidden_layers"]),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        )
        geometry.check()
        return geometry

    def check(self) -> None:
        """Refuse what no release has and the later stages do not expect."""
        experts = self.num_hidden_layers * self.n_routed_experts
        if experts > _MAX_EXPERTS:
            raise CheckpointError(
                f"config.json: {self.num_hidden_layers:,} layers of {self.n_routed_experts:,} "
                f"experts are {experts:,}, beyond any real model. Fetch config.json again."
            )
        if len(self.indexer_types) != self.num_hidden_layers:
            raise CheckpointError(
                f"config.json: indexer_types has {len(self.indexer_types)} entries, "
                f"num_hidden_layers is {self.num_hidden_layers}."
            )
        if self.indexer_types and self.indexer_types[0] != "full":
            raise CheckpointError(
                "config.json: indexer_types begins with a shared layer, which has no earlier full "
                "layer whose top-k it could reuse."
            )
        if self.tie_word_embeddings:
            raise CheckpointError(
                "config.json: tie_word_embeddings is true; no GLM release ties them and the "
                "recipes give lm_head a scheme of its own."
            )

    def is_dense(self, layer: int) -> bool:
        """Whether a layer's MLP is dense rather than a mixture of experts."""
        return layer < self.first_k_dense_replace

    def tensors(self) -> Iterator[tuple[str, Shape, str]]:
        """Yield (name, shape, dtype) of every tensor of the main model, in numeric layer order.

        Weights are in the checkpoint's dtype (written "W" here); only the router's bias is F32.
        """
        vocab_shape = (self.vocab_size, self.hidden_size)
        yield "model.embed_tokens.weight", vocab_shape, "W"
        for layer in range(self.num_hidden_layers):
            yield from self._layer(layer)
        yield "model.norm.weight", (self.hidden_size,), "W"
        yield "lm_head.weight", vocab_shape, "W"

    def mtp_tensors(self) -> Iterator[tuple[str, Shape, str]]:
        """Yield the tensors of the multi-token-prediction layers, stored past the last layer."""
        whole = replace(
            self,
            num_hidden_layers=self.num_hidden_layers + self.num_nextn_predict_layers,
            indexer_types=(*self.indexer_types, *["full"] * self.num_nextn_predict_layers),
        )
        hidden = self.hidden_size
        for layer in range(self.num_hidden_layers, whole.num_hidden_layers):
            p = f"model.layers.{layer}"
            yield f"{p}.eh_proj.weight", (hidden, 2 * hidden), "W"
            for norm in ("enorm", "hnorm", "shared_head.norm"):
                yield f"{p}.{norm}.weight", (hidden,), "W"
            yield from whole._layer(layer)

    def _layer(self, layer: int) -> Iterator[tuple[str, Shape, str]]:
        p, hidden = f"model.layers.{layer}", self.hidden_size
        yield f"{p}.input_layernorm.weight", (hidden,), "W"
        yield f"{p}.post_attention_layernorm.weight", (hidden,), "W"
        for name, shape in self._attention().items():
            yield f"{p}.self_attn.{name}", shape, "W"
        if self.indexer_types[layer] == "full":
            for name, shape in self._indexer().items():
                yield f"{p}.self_attn.indexer.{name}", shape, "W"
        if self.is_dense(layer):
            yield from _mlp(f"{p}.mlp", hidden, self.intermediate_size)
            return
        yield f"{p}.mlp.gate.weight", (self.n_routed_experts, hidden), "W"
        yield f"{p}.mlp.gate.e_score_correction_bias", (self.n_routed_experts,), "F32"
        shared = self.moe_intermediate_size * self.n_shared_experts
        yield from _mlp(f"{p}.mlp.shared_experts", hidden, shared)
        for expert in range(self.n_routed_experts):
            yield from _mlp(f"{p}.mlp.experts.{expert}", hidden, self.moe_intermediate_size)

    def _attention(self) -> dict[str, Shape]:
        heads, hidden = self.num_attention_heads, self.hidden_size
        q_head = self.qk_nope_head_dim + self.qk_rope_head_dim
        return {
            "q_a_proj.weight": (self.q_lora_rank, hidden),
            "q_a_layernorm.weight": (self.q_lora_rank,),
            "q_b_proj.weight": (heads * q_head, self.q_lora_rank),
            "kv_a_proj_with_mqa.weight": (self.kv_lora_rank + self.qk_rope_head_dim, hidden),
            "kv_a_layernorm.weight": (self.kv_lora_rank,),
            "kv_b_proj.weight": (
                heads * (self.qk_nope_head_dim + self.v_head_dim),
                self.kv_lora_rank,
            ),
            "o_proj.weight": (hidden, heads * self.v_head_dim),
        }

    def _indexer(self) -> dict[str, Shape]:
        return {
            "wq_b.weight": (self.index_n_heads * self.index_head_dim, self.q_lora_rank),
            "wk.weight": (self.index_head_dim, self.hidden_size),
            "weights_proj.weight": (self.index_n_heads, self.hidden_size),
            "k_norm.weight": (self.index_head_dim,),
            "k_norm.bias": (self.index_head_dim,),
        }


# GLM-5.2 has 78 layers, 256 experts and dims up to 154,880. A config that claims millions of
# tensors must not be believed, even to find out that the index does not name them.
_COUNTS = ("num_hidden_layers", "num_nextn_predict_layers", "n_routed_experts")
_MAX_COUNT = 4096
_MAX_EXPERTS = 1 << 20
_MAX_DIM = 1 << 24
_MAY_BE_ZERO = ("num_nextn_predict_layers", "first_k_dense_replace")

# Keys without a default must stand in config.json.
_DIMS: dict[str, int | None] = {
    "vocab_size": None,
    "hidden_size": None,
    "intermediate_size": None,
    "moe_intermediate_size": None,
    "num_hidden_layers": None,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": None,
    "n_routed_experts": None,
    "n_shared_experts": None,
    "num_experts_per_tok": None,
    "num_attention_heads": None,
    "q_lora_rank": None,
    "kv_lora_rank": None,
    "qk_nope_head_dim": None,
    "qk_rope_head_dim": None,
    "v_head_dim": None,
    "index_n_heads": None,
    "index_head_dim": None,
    "index_topk": None,
}


def _mlp(prefix: str, hidden: int, intermediate: int) -> Iterator[tuple[str, Shape, str]]:
    yield f"{prefix}.gate_proj.weight", (intermediate, hidden), "W"
    yield f"{prefix}.up_proj.weight", (intermediate, hidden), "W"
    yield f"{prefix}.down_proj.weight", (hidden, intermediate), "W"


def _indexer_types(config: Mapping[str, Any], layers: int) -> tuple[str, ...]:
    """Which layers run an indexer: the list, else the pattern, else frequency and offset.

    The order and the formula are transformers 5.23's (`GlmMoeDsaConfig.__post_init__`). GLM-5 and
    5.1 have none of the keys: every layer is full.
    """
    explicit = config.get("indexer_types")
    pattern = config.get("index_topk_pattern")
    for key, value in (("indexer_types", explicit), ("index_topk_pattern", pattern)):
        if value is not None and not isinstance(value, list | str):
            raise CheckpointError(
                f"config.json: {key} is {shorten(value)}, a list is needed. Fetch config.json "
                "again."
            )
    if explicit is not None:
        types = tuple(str(kind) for kind in explicit)
    elif pattern is not None:
        letters = {"F": "full", "S": "shared"}
        types = tuple(letters.get(str(letter), str(letter)) for letter in pattern)
    else:
        frequency, offset = (
            _whole_number(config, key, default)
            for key, default in (("index_topk_freq", 1), ("index_skip_topk_offset", 2))
        )
        frequency = max(frequency, 1)
        types = tuple(
            "full" if max(layer - offset + 1, 0) % frequency == 0 else "shared"
            for layer in range(layers)
        )
    strange = next((kind for kind in types if kind not in ("full", "shared")), None)
    if strange is not None:
        raise CheckpointError(
            f"config.json: indexer_types holds {shorten(strange)}; only 'full' and 'shared' are "
            "known."
        )
    return types


def _whole_number(config: Mapping[str, Any], key: str, default: int) -> int:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool):
        raise CheckpointError(
            f"config.json: {key} is {shorten(value)}, a whole number is needed. Fetch config.json "
            "again."
        )
    return value
