"""The streaming comparison: layer by layer, for models that fit into no memory.

One pass over the layers carries two trajectories. The *reference's* own hidden states feed both the
reference layer and our unquantized layer, so an error cannot hide in what came before and every
layer is judged alone; the *build's* own hidden states run beside them, so its error is seen to
grow.

A swapped key need not be an error. Two implementations in float32
round differently, and where two keys (or experts) score alike to within that rounding either may
win. Such a tie is recognised by its scores in float64 and counted, its row is left out of that
layer's error, and a swap that its scores do not explain breaks the bound however small its effect.
"""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from pydantic import BaseModel, ConfigDict

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.parity.candidate import BuildLayers, SourceLayers, to_numpy
from glm_quant.parity.measures import (
    Array,
    causal,
    mean_relative_error,
    overlap,
    relative_error,
    ties,
)
from glm_quant.parity.reference import LayerOutcome, ReferenceLayers

log = logging.getLogger(__name__)


class LayerParity(BaseModel):
    """One row of the table.

    Attributes:
        layer: Index from 0.
        kind: "full" (own indexer) or "shared".
        attention_error: max |ours - reference| / max |reference| of the attention block's output,
            unquantized, on the reference's input.
        mlp_error: Likewise of the MLP block.
        tied_keys: Rows whose selection differs by a tie, and is left out of `attention_error`.
        wrong_keys: Rows whose selection differs by more.
        tied_experts: Rows whose experts differ by a tie, and are left out of `mlp_error`.
        wrong_experts: Rows whose experts differ by more.
        build_error: Norm of the difference between the build's hidden states after this layer and
            the reference's, relative to the reference's.
        build_keys: Mean share of the reference's selected keys that the build selects too.
        build_experts: Mean share of the reference's experts that the build chooses too.
    """

    model_config = ConfigDict(frozen=True)

    layer: int
    kind: str
    attention_error: float
    mlp_error: float
    tied_keys: int = 0
    wrong_keys: int = 0
    tied_experts: int = 0
    wrong_experts: int = 0
    build_error: float | None = None
    build_keys: float | None = None
    build_experts: float | None = None


@dataclass
class Trajectories:
    """Where the pass stands: after the last layer, what the logits are made from.

    Attributes:
        reference: The reference's hidden states, [L, hidden_size].
        reference_topk: The selection of its last full layer, [L, K].
        build: The build's hidden states, [1, L, hidden_size].
        build_topk: Its selection, [1, L, K], or None while all keys are selected.
    """

    reference: Array
    build: mx.array
    reference_topk: Array | None = None
    build_topk: mx.array | None = None


@dataclass
class Streamed:
    """What the pass leaves.

    Attributes:
        rows: The table.
        outcomes: The reference's layers, where they were to be kept.
        reference_logits: [L, vocab_size]; None when the pass ended before the last layer.
        build_logits: Likewise.
    """

    rows: list[LayerParity]
    outcomes: list[LayerOutcome]
    reference_logits: Array | None = None
    build_logits: Array | None = None


def stream(
    source: Checkpoint,
    output: Path,
    tokens: Array,
    layers: list[int],
    *,
    keep: bool = False,
    judge: Callable[[LayerParity], None] = lambda _: None,
    after_layer: Callable[[], None] = lambda: None,
) -> Streamed:
    """Compare layer by layer.

    Args:
        source: The checkpoint that the build was made from.
        output: The build.
        tokens: Token ids, [L], more than index_topk.
        layers: Which layers to compare; the pass ends with the last of them.
        keep: Whether to keep every reference layer, weights and all: for small models.
        judge: Called with each row as soon as it is known; raises to end the pass.
        after_layer: Called when a layer's weights are needed no more.
    """
    pass_ = _Pass(source, output, tokens, keep=keep)
    rows: list[LayerParity] = []
    for row in pass_.rows(layers, after_layer):
        judge(row)
        rows.append(row)
    streamed = Streamed(rows, pass_.outcomes)
    if max(layers) == pass_.depth - 1:
        streamed.reference_logits = pass_.reference.logits(pass_.state.reference)
        streamed.build_logits = pass_.build.logits(pass_.state.build)
    return streamed


class _Pass:
    """The three sources of layers and the two trajectories through them."""

    def __init__(self, source: Checkpoint, output: Path, tokens: Array, *, keep: bool) -> None:
        self.keep = keep
        self.outcomes: list[LayerOutcome] = []
        self.reference = ReferenceLayers(source)
        self.ours = SourceLayers(source, output)
        self.build = BuildLayers(output)
        self.depth = int(self.ours.args.num_hidden_layers)
        self.state = Trajectories(self.reference.embed(tokens), self.build.embed(tokens))

    def rows(self, layers: list[int], after_layer: Callable[[], None]) -> Iterator[LayerParity]:
        for index in range(max(layers) + 1):
            started = time.monotonic()
            row = self._row(index, compare=index in layers)
            after_layer()
            if row is not None:
                log.info(
                    "parity: layer %d of %d, attention %.1e, mlp %.1e, build %.1e (%.1f s)",
                    index + 1,
                    self.depth,
                    row.attention_error,
                    row.mlp_error,
                    row.build_error or 0.0,
                    time.monotonic() - started,
                )
                yield row

    def _row(self, index: int, *, compare: bool) -> LayerParity | None:
        state = self.state
        last_topk = state.reference_topk
        outcome = self.reference.run(index, state.reference, last_topk)
        row = None
        if compare:
            layer = self.ours.layer(index)
            row = _compare(layer, self.ours, index, state.reference, last_topk, outcome)
        if self.keep:
            self.outcomes.append(outcome)
        state.reference, state.reference_topk = outcome.output, outcome.topk
        build = self._advance_build(index, outcome)
        return row.model_copy(update=build) if row is not None else None

    def _advance_build(self, index: int, outcome: LayerOutcome) -> dict[str, float | None]:
        """Move the build one layer on, and say how far it is from the reference."""
        state = self.state
        layer = self.build.layer(index)
        gate = _listen(layer)
        h, topk = layer(state.build, self.build.first_span(), None, state.build_topk)
        mx.eval(h) if topk is None else mx.eval(h, topk)
        state.build, state.build_topk = h, topk
        keys = experts = None
        if topk is not None:
            selected = causal(np.array(topk[0]).astype(np.int64))
            keys = float(overlap(selected, outcome.topk)[outcome.topk.shape[1] :].mean())
        if gate is not None and outcome.experts is not None:
            experts = float(overlap(gate.chosen, outcome.experts).mean())
        error = mean_relative_error(to_numpy(h[0]), outcome.output)
        return {"build_error": error, "build_keys": keys, "build_experts": experts}


def _compare(
    layer: Any,
    source_layers: SourceLayers,
    index: int,
    hidden: Array,
    last_topk: Array | None,
    ref: LayerOutcome,
) -> LayerParity:
    """Run our layer on the reference's states and compare each block's output."""
    x = mx.array(hidden)[None]
    kind = source_layers.args.schedule[index]
    passed = None
    if last_topk is not None and len(hidden) > source_layers.args.index_topk:
        passed = mx.array(np.where(last_topk < 0, len(hidden) - 1, last_topk))[None]
    attention, topk = layer.self_attn(
        layer.input_layernorm(x),
        source_layers.first_span(),
        None,
        passed if kind == "shared" else None,
    )
    tied_keys = wrong_keys = 0
    same = np.ones(len(hidden), bool)
    if kind == "full" and topk is not None:
        selected = causal(np.array(topk[0]).astype(np.int64))
        same = np.sort(selected) == np.sort(ref.topk)
        same = same.all(-1)
        if not same.all():
            tied = ties(selected, ref.topk, *ref.index_scores())
            tied_keys, wrong_keys = int((tied & ~same).sum()), int((~tied & ~same).sum())
    gate = _listen(layer)
    middle = mx.array(ref.middle)[None]
    mlp = layer.mlp(layer.post_attention_layernorm(middle))
    mx.eval(mlp)
    tied_experts = wrong_experts = 0
    routed = np.ones(len(hidden), bool)
    if gate is not None and ref.experts is not None:
        routed = (np.sort(gate.chosen) == np.sort(ref.experts)).all(-1)
        if not routed.all():
            tied = ties(gate.chosen, ref.experts, *ref.expert_scores())
            tied_experts, wrong_experts = int((tied & ~routed).sum()), int((~tied & ~routed).sum())
    return LayerParity(
        layer=index,
        kind=kind,
        attention_error=relative_error(to_numpy(attention[0])[same], ref.attention[same]),
        mlp_error=relative_error(to_numpy(mlp[0])[routed], ref.mlp[routed]),
        tied_keys=tied_keys,
        wrong_keys=wrong_keys,
        tied_experts=tied_experts,
        wrong_experts=wrong_experts,
    )


class _Listener:
    """Stands in front of a router and remembers what it chose."""

    def __init__(self, gate: Any) -> None:
        self._gate = gate
        self.chosen: Array = np.zeros((0, 0), np.int64)

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        chosen, weights = self._gate(x)
        self.chosen = np.array(chosen).astype(np.int64).reshape(-1, chosen.shape[-1])
        return chosen, weights


def _listen(layer: Any) -> _Listener | None:
    """Put a listener before the layer's router, if it has one."""
    if "gate" not in layer.mlp:
        return None
    listener = _Listener(layer.mlp["gate"])
    layer.mlp.gate = listener
    return listener
