"""The reference: transformers' `GlmMoeDsaForCausalLM`, on the CPU and in float32.

The only module here that touches torch and transformers, and only once something is asked of it: a
machine that merely converts has neither. Arrays cross its border as numpy. Being transformers is
not enough. Releases before its fix #46842 rotate the indexer
half-split, which looks like a small model's noise and is an error; `require_reference` runs the
installed indexer and looks.
"""

from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import ParityError
from glm_quant.parity.index_scores import Indexer, Rotation, index_scores
from glm_quant.parity.measures import Array

_WAY_OUT = "Install it with `uv sync --group parity` or `pip install 'glm-quant[parity]'`"


@cache
def require_reference() -> dict[str, str]:
    """Check that the reference is installed and rotates as GLM does.

    Returns:
        The versions of torch and transformers.

    Raises:
        ParityError: It is absent, or its indexer does not rotate interleaved pairs.
    """
    try:
        versions = {name: version(name) for name in ("torch", "transformers")}
        import_module("transformers.models.glm_moe_dsa.modeling_glm_moe_dsa")
    except (PackageNotFoundError, ImportError) as error:
        raise ParityError(
            f"The parity stage compares with transformers, which cannot be used here: {error}. "
            f"{_WAY_OUT}."
        ) from None
    rotation = indexer_rotation()
    if rotation != "interleaved":
        raise ParityError(
            f"transformers {versions['transformers']} rotates GLM's indexer {rotation}, not "
            "interleaved as the vendor does (fixed by its pull request 46842), so equality with it "
            "would prove nothing. Upgrade transformers to 5.16 or newer."
        )
    return versions


def indexer_rotation() -> str:
    """Run the installed indexer on random weights and name the rotation that explains its choice.

    Returns:
        "interleaved", "half-split" or "unknown".
    """
    import torch

    config = _config(_PROBE)
    torch.manual_seed(0)
    model = import_module("transformers").GlmMoeDsaForCausalLM(config).eval()
    indexer = model.model.layers[0].self_attn.indexer
    torch.nn.init.normal_(indexer.wq_b.weight)
    torch.nn.init.normal_(indexer.wk.weight)
    calls: dict[str, Any] = {}

    def keep(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        names = ("hidden_states", "q_resid")
        calls.update(dict(zip(names, args, strict=False)) | kwargs, chosen=output)

    hook = indexer.register_forward_hook(keep, with_kwargs=True)
    tokens = torch.arange(1, 1 + _PROBE_TOKENS)[None]
    with torch.no_grad():
        model(tokens)
    hook.remove()
    weights = _weights_of(indexer, model.model.rotary_emb.inv_freq)
    inputs = calls["hidden_states"][0].numpy(), calls["q_resid"][0].numpy()
    k = config.index_topk
    chosen = np.sort(calls["chosen"][0].numpy(), axis=-1)[k:]
    rotations: tuple[Rotation, ...] = ("interleaved", "half-split")
    for rotation in rotations:
        scores, _ = index_scores(weights, *inputs, rotation)
        if np.array_equal(chosen, np.sort(np.argsort(-scores, axis=-1)[:, :k], axis=-1)[k:]):
            return rotation
    return "unknown"


_PROBE_TOKENS = 48
_PROBE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 32,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "index_n_heads": 32,
    "index_head_dim": 16,
    "index_topk": 8,
    "rope_parameters": {"rope_theta": 100.0, "rope_type": "default"},
    "pad_token_id": 0,
}


def _weights_of(indexer: Any, inverse: Any) -> Indexer:
    def values(parameter: Any) -> Array:
        return parameter.detach().float().numpy()

    return Indexer(
        wq_b=values(indexer.wq_b.weight),
        wk=values(indexer.wk.weight),
        weights_proj=values(indexer.weights_proj.weight),
        norm=(values(indexer.k_norm.weight), values(indexer.k_norm.bias)),
        eps=indexer.k_norm.eps,
        inverse=values(inverse),
    )


def _config(values: dict[str, Any]) -> Any:
    config = import_module("transformers").GlmMoeDsaConfig(**values)
    config._attn_implementation = "eager"
    return config


class ReferenceModel:
    """The whole reference model in float32: for checkpoints that fit into memory."""

    def __init__(self, source: Path) -> None:
        """Load the checkpoint in the folder `source`.

        Raises:
            ParityError: The reference is absent or wrong, or left weights uninitialised.
        """
        self.versions = require_reference()
        import torch

        logging = import_module("transformers.utils.logging")
        logging.set_verbosity_error()  # it would list the MTP tensors, which nobody loads
        logging.disable_progress_bar()
        loader = import_module("transformers").GlmMoeDsaForCausalLM
        self._model, info = loader.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, attn_implementation="eager"
        )
        if info["missing_keys"]:
            raise ParityError(
                f"{source}: transformers found no weights for {sorted(info['missing_keys'])[:3]}. "
                "The checkpoint is incomplete or in another layout than the release's."
            )
        self._model.eval()

    def logits(self, tokens: Array, padding: int = 0) -> Array:
        """Return float32 logits, [positions, vocab_size].

        Args:
            tokens: token ids, [positions].
            padding: how many of the first are padding.
        """
        import torch

        ids = torch.from_numpy(np.asarray(tokens, np.int64))[None]
        mask = torch.ones_like(ids)
        mask[:, :padding] = 0
        with torch.no_grad():
            return self._model(ids, attention_mask=mask, use_cache=False).logits[0].numpy()


@dataclass(frozen=True)
class LayerOutcome:
    """What one reference layer made of its input; float32, positions first.

    Attributes:
        attention: Output of the attention block, [L, hidden_size].
        middle: Residual stream between attention and MLP, [L, hidden_size].
        mlp: Output of the MLP block, [L, hidden_size].
        topk: The selected keys that attention used, [L, K]; -1 where fewer are visible.
        experts: The chosen experts, [L, num_experts_per_tok], or None in a dense layer.
    """

    attention: Array
    middle: Array
    mlp: Array
    topk: Array
    experts: Array | None
    _layer: Any = field(repr=False)
    _normed: Any = field(repr=False)
    _q_resid: Any = field(repr=False)
    _mlp_input: Any = field(repr=False)
    _inverse: Any = field(repr=False)

    @property
    def output(self) -> Array:
        """The residual stream after the layer, [L, hidden_size]."""
        return self.middle + self.mlp

    def index_scores(self) -> tuple[Array, Array]:
        """Return index scores and their magnitudes in float64, both [L, L]: to judge ties."""
        weights = _weights_of(self._layer.self_attn.indexer, self._inverse)
        return index_scores(weights, self._normed.numpy(), self._q_resid.numpy())

    def expert_scores(self) -> tuple[Array, Array]:
        """Return what experts are chosen by and its magnitudes, both [L, n_routed_experts]."""
        gate = self._layer.mlp.gate
        x = self._mlp_input.double().numpy()
        weight, bias = (
            p.detach().double().numpy() for p in (gate.weight, gate.e_score_correction_bias)
        )
        scores = 1 / (1 + np.exp(-(x @ weight.T))) + bias
        # A sigmoid's slope is at most 1/4; 1 stands for the sum with the bias.
        sizes = 1 + 0.25 * np.linalg.norm(x, axis=-1)[:, None] * np.linalg.norm(weight, axis=-1)
        return scores, sizes


class ReferenceLayers:
    """transformers' decoder layers on a source's weights, one in memory at a time.

    A layer's routed experts come in blocks of `_BLOCK_BYTES`, so that at GLM-5.2's dims a layer
    needs about 3 GB in float32 instead of 39 GB.
    """

    def __init__(self, source: Checkpoint) -> None:
        """Read the config; no weight yet.

        Raises:
            ParityError: The reference is absent or wrong.
        """
        self.versions = require_reference()
        self._source = source
        self.config = import_module("transformers").GlmMoeDsaConfig.from_dict(dict(source.config))
        self.config._attn_implementation = "sdpa"
        self.config._experts_implementation = "eager"
        self._code = import_module("transformers.models.glm_moe_dsa.modeling_glm_moe_dsa")
        self._rotary = self._code.GlmMoeDsaRotaryEmbedding(self.config)

    def embed(self, tokens: Array) -> Array:
        """Return the embeddings of token ids, [positions, hidden_size]."""
        table = self._source.read("model.embed_tokens.weight")
        return np.array(table[mx.array(tokens)].astype(mx.float32))

    def logits(self, hidden: Array) -> Array:
        """Return logits, [positions, vocab_size], of final hidden states before the last norm."""
        import torch

        norm = self._code.GlmMoeDsaRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.load_state_dict({"weight": self._read("model.norm.weight")})
        tied = self.config.tie_word_embeddings
        head = self._source.read("model.embed_tokens.weight" if tied else "lm_head.weight")
        with torch.no_grad():
            normed = norm(torch.from_numpy(hidden))
            parts = [
                normed @ _to_torch(head[i : i + _HEAD_ROWS]).T
                for i in range(0, head.shape[0], _HEAD_ROWS)
            ]
        return torch.cat(parts, -1).numpy()

    def run(self, index: int, hidden: Array, topk: Array | None) -> LayerOutcome:
        """Run one layer on [positions, hidden_size] and the selection of the last full layer."""
        import torch

        layer = self._load(index)
        calls: dict[str, Any] = {}

        def keep(name: str) -> Any:
            def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
                calls[name] = (args, kwargs, output)

            return hook

        layer.self_attn.register_forward_hook(keep("attention"), with_kwargs=True)
        layer.self_attn.q_a_layernorm.register_forward_hook(keep("q_resid"), with_kwargs=True)
        layer.input_layernorm.register_forward_hook(keep("normed"), with_kwargs=True)
        layer.mlp.register_forward_hook(keep("mlp"), with_kwargs=True)
        if hasattr(layer.mlp, "gate"):
            layer.mlp.gate.register_forward_hook(keep("gate"), with_kwargs=True)
        length = len(hidden)
        x = torch.from_numpy(np.ascontiguousarray(hidden))[None]
        mask = torch.full((length, length), torch.finfo(torch.float32).min).triu(1)[None, None]
        last_topk = None if topk is None else torch.from_numpy(_fill(topk))[None]
        with torch.no_grad():
            layer(
                x,
                attention_mask=mask,
                position_embeddings=self._rotary(x, torch.arange(length)[None]),
                prev_topk_indices=last_topk,
            )
        attention, _, chosen = calls["attention"][2]
        selected = chosen[0].numpy().astype(np.int64)
        selected[selected > np.arange(length)[:, None]] = -1
        experts = calls["gate"][2][2].numpy() if "gate" in calls else None
        return LayerOutcome(
            attention=attention[0].numpy(),
            middle=(x + attention)[0].numpy(),
            mlp=calls["mlp"][2][0].numpy(),
            topk=selected,
            experts=experts,
            _layer=layer,
            _normed=calls["normed"][2][0],
            _q_resid=calls["q_resid"][2][0],
            _mlp_input=calls["mlp"][0][0][0],
            _inverse=self._rotary.inv_freq,
        )

    def _read(self, name: str) -> Any:
        return _to_torch(self._source.read(name))

    def _load(self, index: int) -> Any:
        import torch

        with torch.device("meta"):
            layer = self._code.GlmMoeDsaDecoderLayer(self.config, index)
        prefix = f"model.layers.{index}."
        if hasattr(layer.mlp, "experts"):
            layer.mlp.experts = _streamed_experts(self, f"{prefix}mlp.experts")
        state = {name: self._read(prefix + name) for name in layer.state_dict()}
        layer.load_state_dict(state, assign=True)
        return layer.eval()

    def experts(self, prefix: str, first: int, count: int) -> Any:
        """Return transformers' experts module holding `count` experts from `first` on."""
        import torch

        config = import_module("copy").copy(self.config)
        config.n_routed_experts = count
        with torch.device("meta"):
            module = self._code.GlmMoeDsaExperts(config)
        gate_up: list[Any] = []
        down: list[Any] = []
        for expert in range(first, first + count):
            names = (f"{prefix}.{expert}.{name}_proj.weight" for name in ("gate", "up", "down"))
            gate, up, last = map(self._read, names)
            gate_up.append(torch.cat([gate, up]))
            down.append(last)
        state = {"gate_up_proj": torch.stack(gate_up), "down_proj": torch.stack(down)}
        module.load_state_dict(state, assign=True)
        return module


_BLOCK_BYTES = 1 << 30
_HEAD_ROWS = 16384


def _streamed_experts(layers: ReferenceLayers, prefix: str) -> Any:
    """Return a stand-in for the experts module that loads them block by block."""
    import torch

    config = layers.config
    each = 12 * config.moe_intermediate_size * config.hidden_size  # three float32 matrices
    count = max(min(_BLOCK_BYTES // each, config.n_routed_experts), 1)

    class StreamedExperts(torch.nn.Module):
        def forward(self, hidden: Any, chosen: Any, weights: Any) -> Any:
            total = torch.zeros_like(hidden)
            for first in range(0, config.n_routed_experts, count):
                n = min(count, config.n_routed_experts - first)
                inside = (chosen >= first) & (chosen < first + n)
                if inside.any():
                    # The module skips the index one past its last expert.
                    local_experts = torch.where(inside, chosen - first, n)
                    total += layers.experts(prefix, first, n)(hidden, local_experts, weights)
            return total

    return StreamedExperts()


def _fill(topk: Array) -> Array:
    """Replace -1 by a later position, which the causal mask hides."""
    rows = np.arange(len(topk))[:, None]
    return np.where(topk < 0, np.minimum(rows + 1, len(topk) - 1), topk)


def _to_torch(array: mx.array) -> Any:
    import torch

    return torch.from_numpy(np.array(array.astype(mx.float32)))
