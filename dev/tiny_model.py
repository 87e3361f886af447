"""The small checkpoint's shape and its training forward, in plain torch on named parameters.

The forward is the mathematics of transformers' `GlmMoeDsaForCausalLM`, arranged for speed on a CPU:
all experts of a layer are three wide matrix products with the router's weights in between, and the
indexer is only scored for some rows while it learns. `measure_tiny` checks that the two agree.

What a reader would get wrong: parameters carry the release's names, but a layer's experts are kept
joined (`mlp.experts.gate_proj.weight` [experts * width, hidden]) until `pack` splits them.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812 - torch's own custom

from dev.text import VOCAB_SIZE

Params = dict[str, Tensor]


@dataclass(frozen=True)
class TinyShape:
    """Dimensions, named as in `config.json`; 64 divides each quantized matrix's last one."""

    vocab_size: int = VOCAB_SIZE
    hidden_size: int = 256
    intermediate_size: int = 256
    moe_intermediate_size: int = 64
    num_hidden_layers: int = 5
    first_k_dense_replace: int = 1
    n_routed_experts: int = 12
    num_experts_per_tok: int = 2
    routed_scaling_factor: float = 2.5
    num_attention_heads: int = 4
    q_lora_rank: int = 64
    kv_lora_rank: int = 64
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 32
    v_head_dim: int = 64
    index_n_heads: int = 32
    index_head_dim: int = 64
    index_topk: int = 64
    index_topk_freq: int = 2
    index_skip_topk_offset: int = 2
    rope_theta: int = 10000
    rms_norm_eps: float = 1e-5

    @property
    def qk_head_dim(self) -> int:
        """Width of one head's query and key."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    def is_full(self, layer: int) -> bool:
        """Tell whether a layer runs its own indexer: by the release's rule; the MTP layer does."""
        if layer == self.num_hidden_layers:
            return True
        return max(layer - self.index_skip_topk_offset + 1, 0) % self.index_topk_freq == 0

    def is_dense(self, layer: int) -> bool:
        """Tell whether a layer has a plain MLP instead of experts."""
        return layer < self.first_k_dense_replace


def init_params(shape: TinyShape, seed: int) -> Params:
    """Draw the starting weights: normal with fan-in scale, 1 for norms, 0 for biases."""
    rng = torch.Generator().manual_seed(seed)
    params: Params = {}

    def matrix(name: str, rows: int, columns: int, gain: float = 1.0) -> None:
        std = gain * 0.5 * columns**-0.5
        params[f"{name}.weight"] = torch.randn(rows, columns, generator=rng) * std

    def norm(name: str, width: int) -> None:
        params[f"{name}.weight"] = torch.ones(width)

    s = shape
    # 0.5 / sqrt(columns) * 0.64 = 0.02, the release's initializer_range.
    matrix("model.embed_tokens", s.vocab_size, s.hidden_size, 16.0)
    matrix("lm_head", s.vocab_size, s.hidden_size, 0.2)
    norm("model.norm", s.hidden_size)
    for layer in range(s.num_hidden_layers + 1):
        at = f"model.layers.{layer}"
        norm(f"{at}.input_layernorm", s.hidden_size)
        norm(f"{at}.post_attention_layernorm", s.hidden_size)
        attention = f"{at}.self_attn"
        matrix(f"{attention}.q_a_proj", s.q_lora_rank, s.hidden_size)
        norm(f"{attention}.q_a_layernorm", s.q_lora_rank)
        matrix(f"{attention}.q_b_proj", s.num_attention_heads * s.qk_head_dim, s.q_lora_rank)
        matrix(
            f"{attention}.kv_a_proj_with_mqa", s.kv_lora_rank + s.qk_rope_head_dim, s.hidden_size
        )
        norm(f"{attention}.kv_a_layernorm", s.kv_lora_rank)
        expanded = s.num_attention_heads * (s.qk_nope_head_dim + s.v_head_dim)
        matrix(f"{attention}.kv_b_proj", expanded, s.kv_lora_rank)
        matrix(f"{attention}.o_proj", s.hidden_size, s.num_attention_heads * s.v_head_dim, 0.5)
        if s.is_full(layer):
            indexer = f"{attention}.indexer"
            matrix(f"{indexer}.wq_b", s.index_n_heads * s.index_head_dim, s.q_lora_rank)
            matrix(f"{indexer}.wk", s.index_head_dim, s.hidden_size)
            matrix(f"{indexer}.weights_proj", s.index_n_heads, s.hidden_size)
            norm(f"{indexer}.k_norm", s.index_head_dim)
            params[f"{indexer}.k_norm.bias"] = torch.zeros(s.index_head_dim)
        if s.is_dense(layer):
            _init_mlp(matrix, f"{at}.mlp", s.hidden_size, s.intermediate_size)
            continue
        matrix(f"{at}.mlp.gate", s.n_routed_experts, s.hidden_size)
        params[f"{at}.mlp.gate.e_score_correction_bias"] = torch.zeros(s.n_routed_experts)
        _init_mlp(matrix, f"{at}.mlp.shared_experts", s.hidden_size, s.moe_intermediate_size)
        # down_proj's fan-in is one expert, so the joined matrix is drawn with that scale.
        _init_mlp(
            matrix, f"{at}.mlp.experts", s.hidden_size, s.n_routed_experts * s.moe_intermediate_size
        )
    last = f"model.layers.{s.num_hidden_layers}"
    matrix(f"{last}.eh_proj", s.hidden_size, 2 * s.hidden_size)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        norm(f"{last}.{name}", s.hidden_size)
    return params


def _init_mlp(matrix: Any, at: str, hidden: int, width: int) -> None:
    matrix(f"{at}.gate_proj", width, hidden)
    matrix(f"{at}.up_proj", width, hidden)
    matrix(f"{at}.down_proj", hidden, width, 1.0)


@dataclass
class Trace:
    """What a forward pass leaves behind beside its output.

    Attributes:
        hidden: States after the final norm [batch, length, hidden].
        loads: Share of the routed slots that each expert got, by layer.
        index_losses: KL from the indexer's distribution to the attention it selects from, by full
            layer.
        recalls: Share of the attention's mass on the tokens that the indexer would keep, by full
            layer.
    """

    hidden: Tensor = field(default_factory=lambda: torch.empty(0))
    loads: dict[int, Tensor] = field(default_factory=dict[int, Tensor])
    index_losses: list[Tensor] = field(default_factory=list[Tensor])
    recalls: list[float] = field(default_factory=list[float])


@dataclass
class _Group:
    """A full layer's indexer scores and the attention of the layers that use its selection."""

    scores: Tensor
    attentions: list[Tensor] = field(default_factory=list[Tensor])


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Scale to unit root mean square, computed in float32 whatever the input's dtype."""
    return F.rms_norm(x.float(), (x.shape[-1],), weight, eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate interleaved pairs (x0, x1), (x2, x3) …; the result is stored de-interleaved, as in
    transformers.
    """
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)


class TinyGlm:
    """Forward pass over a set of named parameters."""

    def __init__(self, shape: TinyShape, params: Params, max_length: int = 2048) -> None:
        self.shape = shape
        self.params = params
        dim = shape.qk_rope_head_dim
        frequencies = 1.0 / shape.rope_theta ** (torch.arange(0, dim, 2).float() / dim)
        angles = torch.arange(max_length).float()[:, None] * frequencies
        self._cos, self._sin = angles.cos(), angles.sin()

    def __call__(
        self,
        tokens: Tensor,
        *,
        sparse: bool,
        index_rows: Tensor | None = None,
        with_mtp: bool = False,
    ) -> tuple[Trace, Tensor | None]:
        """Run the model.

        Args:
            tokens: Ids [batch, length].
            sparse: Apply the indexers' top-k selection; else attend to everything.
            index_rows: Query rows on which the indexers learn (None: they do not).
            with_mtp: Also run the MTP layer, on detached states.

        Returns:
            The trace, and the MTP layer's normed states [batch, length - 1, hidden] or None.
        """
        s, trace = self.shape, Trace()
        x = F.embedding(tokens, self.params["model.embed_tokens.weight"])
        selection: Tensor | None = None
        group: _Group | None = None
        for layer in range(s.num_hidden_layers):
            if s.is_full(layer):
                self._close(group, trace)
                group = None
            x, selection, group = self._layer(
                layer, x, selection, group, trace, sparse=sparse, index_rows=index_rows
            )
        self._close(group, trace)
        trace.hidden = rms_norm(x, self.params["model.norm.weight"], s.rms_norm_eps)
        drafted = self._mtp(tokens, trace, sparse, index_rows) if with_mtp else None
        return trace, drafted

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the vocabulary, in float32."""
        return F.linear(hidden, self.params["lm_head.weight"]).float()

    def _mtp(self, tokens: Tensor, trace: Trace, sparse: bool, index_rows: Tensor | None) -> Tensor:
        """Predict the token after next from the final state and the next token's embedding."""
        s, layer = self.shape, self.shape.num_hidden_layers
        at = f"model.layers.{layer}"
        embedded = F.embedding(tokens[:, 1:], self.params["model.embed_tokens.weight"].detach())
        joined = torch.cat(
            [
                rms_norm(embedded, self.params[f"{at}.enorm.weight"], s.rms_norm_eps),
                rms_norm(
                    trace.hidden[:, :-1].detach(), self.params[f"{at}.hnorm.weight"], s.rms_norm_eps
                ),
            ],
            dim=-1,
        )
        x = F.linear(joined, self.params[f"{at}.eh_proj.weight"])
        if index_rows is not None:
            index_rows = index_rows[index_rows < x.shape[1]]
        x, _, group = self._layer(layer, x, None, None, trace, sparse=sparse, index_rows=index_rows)
        self._close(group, trace)
        return rms_norm(x, self.params[f"{at}.shared_head.norm.weight"], s.rms_norm_eps)

    def _layer(
        self,
        layer: int,
        x: Tensor,
        selection: Tensor | None,
        group: _Group | None,
        trace: Trace,
        *,
        sparse: bool,
        index_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, _Group | None]:
        p, s, at = self.params, self.shape, f"model.layers.{layer}"
        normed = rms_norm(x, p[f"{at}.input_layernorm.weight"], s.rms_norm_eps)
        attended, selection, group = self._attention(
            layer, normed, selection, group, sparse=sparse, index_rows=index_rows
        )
        x = x + attended
        normed = rms_norm(x, p[f"{at}.post_attention_layernorm.weight"], s.rms_norm_eps)
        if s.is_dense(layer):
            return x + self._mlp(f"{at}.mlp", normed), selection, group
        routed = self._experts(layer, normed, trace)
        return x + routed + self._mlp(f"{at}.mlp.shared_experts", normed), selection, group

    def _attention(
        self,
        layer: int,
        x: Tensor,
        selection: Tensor | None,
        group: _Group | None,
        *,
        sparse: bool,
        index_rows: Tensor | None,
    ) -> tuple[Tensor, Tensor | None, _Group | None]:
        p, s, at = self.params, self.shape, f"model.layers.{layer}.self_attn"
        batch, length, _ = x.shape
        cos, sin = self._cos[:length], self._sin[:length]
        latent = rms_norm(
            F.linear(x, p[f"{at}.q_a_proj.weight"]), p[f"{at}.q_a_layernorm.weight"], 1e-6
        )
        q = F.linear(latent, p[f"{at}.q_b_proj.weight"])
        q = q.view(batch, length, s.num_attention_heads, s.qk_head_dim).transpose(1, 2)
        q_pass, q_rot = q.split([s.qk_nope_head_dim, s.qk_rope_head_dim], dim=-1)
        compressed = F.linear(x, p[f"{at}.kv_a_proj_with_mqa.weight"])
        kv, k_rot = compressed.split([s.kv_lora_rank, s.qk_rope_head_dim], dim=-1)
        kv = rms_norm(kv, p[f"{at}.kv_a_layernorm.weight"], 1e-6)
        kv = F.linear(kv, p[f"{at}.kv_b_proj.weight"])
        kv = kv.view(batch, length, s.num_attention_heads, -1).transpose(1, 2)
        k_pass, v = kv.split([s.qk_nope_head_dim, s.v_head_dim], dim=-1)
        k_rot = rotate(k_rot, cos, sin).to(k_pass.dtype)
        k_rot = k_rot.unsqueeze(1).expand(-1, s.num_attention_heads, -1, -1)
        q = torch.cat([q_pass, rotate(q_rot, cos, sin).to(q_pass.dtype)], dim=-1)
        k = torch.cat([k_pass, k_rot], dim=-1)

        if s.is_full(layer):
            if sparse and length > s.index_topk:
                with torch.no_grad():
                    selection = self._select(at, x, latent)
            if index_rows is not None:
                scores = self._index_scores(at, x.detach(), latent.detach(), index_rows)
                group = _Group(scores.masked_fill(_after(index_rows, length), -torch.inf))
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        allowed = causal if selection is None else selection & causal
        if index_rows is not None and group is not None:
            group.attentions.append(self._target(q, k, index_rows))
        # One width for keys and values lets torch use its fused kernel.
        v = F.pad(v, (0, s.qk_head_dim - s.v_head_dim))
        mask = allowed if allowed.dim() == 2 else allowed.unsqueeze(1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[..., : s.v_head_dim]
        out = out.transpose(1, 2).reshape(batch, length, -1)
        return F.linear(out, p[f"{at}.o_proj.weight"]), selection, group

    @torch.no_grad()
    def _target(self, q: Tensor, k: Tensor, rows: Tensor) -> Tensor:
        """Average the heads' full attention of some query rows: what an indexer must rank by."""
        length = k.shape[2]
        scores = (q[:, :, rows] @ k.transpose(-1, -2)).float() * self.shape.qk_head_dim**-0.5
        return scores.masked_fill(_after(rows, length), -torch.inf).softmax(-1).mean(1)

    def _index_scores(self, at: str, x: Tensor, latent: Tensor, rows: Tensor) -> Tensor:
        """Score every earlier token for some query rows [batch, rows, length]."""
        p, s = self.params, self.shape
        batch, length, _ = x.shape
        q = F.linear(latent[:, rows], p[f"{at}.indexer.wq_b.weight"])
        q = q.view(batch, len(rows), s.index_n_heads, s.index_head_dim)
        k = F.linear(x, p[f"{at}.indexer.wk.weight"]).float()
        k = F.layer_norm(
            k,
            (s.index_head_dim,),
            p[f"{at}.indexer.k_norm.weight"],
            p[f"{at}.indexer.k_norm.bias"],
            1e-6,
        )
        turned = s.qk_rope_head_dim
        cos, sin = self._cos[:length], self._sin[:length]
        row_cos, row_sin = cos[rows][:, None], sin[rows][:, None]
        q = torch.cat([rotate(q[..., :turned].float(), row_cos, row_sin), q[..., turned:]], dim=-1)
        k = torch.cat([rotate(k[..., :turned], cos, sin), k[..., turned:]], dim=-1)
        weights = F.linear(x[:, rows], p[f"{at}.indexer.weights_proj.weight"])
        weights = weights * (s.index_n_heads * s.index_head_dim) ** -0.5
        scores = q.flatten(1, 2) @ k.transpose(-1, -2)
        scores = F.relu(scores).view(batch, len(rows), s.index_n_heads, length)
        return (weights.unsqueeze(-2) @ scores).squeeze(-2).float()

    def _select(self, at: str, x: Tensor, latent: Tensor) -> Tensor:
        """Mark the top-k tokens of every query row [batch, length, length]."""
        length = x.shape[1]
        rows = torch.arange(length)
        hidden = _after(rows, length)
        marks: list[Tensor] = []
        # One sequence at a time: the scores of all heads are the largest array of the whole pass.
        for one in range(x.shape[0]):
            scores = self._index_scores(at, x[one : one + 1], latent[one : one + 1], rows)
            best = scores.masked_fill(hidden, -torch.inf).topk(self.shape.index_topk).indices
            marks.append(torch.zeros(1, length, length, dtype=torch.bool).scatter_(-1, best, True))
        return torch.cat(marks)

    def _close(self, group: _Group | None, trace: Trace) -> None:
        """Compare a full layer's scores with the attention of all the layers that share its
        selection.
        """
        if group is None:
            return
        target = torch.stack(group.attentions).mean(0)
        predicted = group.scores.log_softmax(-1)
        finite = predicted.masked_fill(target == 0, 0.0)
        entropy = torch.special.entr(target).sum(-1)
        trace.index_losses.append(-((target * finite).sum(-1) + entropy).mean())
        best = group.scores.topk(min(self.shape.index_topk, target.shape[-1])).indices
        trace.recalls.append(target.gather(-1, best).sum(-1).mean().item())

    def _mlp(self, at: str, x: Tensor) -> Tensor:
        p = self.params
        gate = F.linear(x, p[f"{at}.gate_proj.weight"])
        inner = F.silu(gate) * F.linear(x, p[f"{at}.up_proj.weight"])
        return F.linear(inner, p[f"{at}.down_proj.weight"])

    def _experts(self, layer: int, x: Tensor, trace: Trace) -> Tensor:
        """Run every expert on every token and weight by the router: dense products beat gathers at
        this size.
        """
        p, s, at = self.params, self.shape, f"model.layers.{layer}.mlp"
        with torch.autocast("cpu", enabled=False):
            scores = F.linear(x.float(), p[f"{at}.gate.weight"]).sigmoid()
        biased = scores + p[f"{at}.gate.e_score_correction_bias"]
        chosen = biased.detach().topk(s.num_experts_per_tok).indices
        mask = torch.zeros_like(scores).scatter_(-1, chosen, 1.0)
        trace.loads[layer] = mask.detach().mean((0, 1)) / s.num_experts_per_tok
        kept = scores * mask
        weights = kept / (kept.sum(-1, keepdim=True) + 1e-20) * s.routed_scaling_factor
        gate = F.linear(x, p[f"{at}.experts.gate_proj.weight"])
        inner = F.silu(gate) * F.linear(x, p[f"{at}.experts.up_proj.weight"])
        inner = inner.unflatten(-1, (s.n_routed_experts, -1)) * weights.unsqueeze(-1).to(
            inner.dtype
        )
        return F.linear(inner.flatten(-2), p[f"{at}.experts.down_proj.weight"])


def _after(rows: Tensor, length: int) -> Tensor:
    """Mark the tokens that a query row may not see [rows, length]."""
    return torch.arange(length) > rows[:, None]
