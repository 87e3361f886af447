"""A whole model's forward pass with one layer in memory, and of its routed experts one at a time.

All sequences pass a layer before the next one is read, so each weight is read once however many
tokens there are. Attention takes sequence by sequence; the feed-forward takes the tokens of all
sequences of a wave, grouped by the expert that they chose. Several token batches may pass together,
each with waves and files of its own, and some as a variant of the model: they share the reading of
weights and nothing else, so each ends with the bytes that it would have alone. A shared layer
attends to the keys that the last full layer selected, so selections are kept with the hidden states
from layer to layer, on disk too.
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from glm_quant.fingerprint import fingerprint
from glm_quant.streaming.activations import Activations, load_arrays, save_arrays
from glm_quant.streaming.hooks import BatchHooks, LayerHooks, Tokens, Variant
from glm_quant.streaming.memory_plan import MLP_ROWS, MemoryPlan
from glm_quant.streaming.products import product
from glm_quant.streaming.weights import Floats, Weights

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


_STATES = "states-"


def forget_states(folder: Path) -> None:
    """Delete the states between layers; call it when what the pass was for is recorded."""
    for path in folder.glob(f"{_STATES}*"):
        shutil.rmtree(path)


def sequence_path(folder: Path, number: int) -> Path:
    """Return where the final hidden states of a sequence stand."""
    return folder / f"sequence-{number:04d}.safetensors"


@dataclass(frozen=True)
class TokenBatch:
    """Sequences that pass the layers together, with a memory plan and files of their own.

    Attributes:
        sequences: token ids, each [L].
        plan: which of them go through a layer at a time.
        folder: where the files go, the batch's alone; the states between layers lie inside it
            until `forget_states`.
        hooks: see what was not passed before an interruption.
        variant: the model, where it is not the one whose weights are read for all.
    """

    sequences: Sequence[Tokens]
    plan: MemoryPlan
    folder: Path
    hooks: BatchHooks | None = None
    variant: Variant | None = None


def stream_states(
    weights: Weights,
    sequences: Sequence[Tokens],
    plan: MemoryPlan,
    folder: Path,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the final hidden states of some sequences: `stream_batches` of one batch."""
    return stream_batches(weights, [TokenBatch(sequences, plan, folder)], progress)[0]


def stream_batches(
    weights: Weights,
    batches: Sequence[TokenBatch],
    progress: Progress | None = None,
    hooks: LayerHooks | None = None,
) -> list[list[Path]]:
    """Write the final hidden states of all sequences of all batches, after the last norm.

    A call that was interrupted continues at its layer, and within the layer at its wave.

    Args:
        weights: the model's; read once for a wave of each batch.
        batches: what passes.
        progress: called with layers done and layers to do.
        hooks: called before and after every layer.

    Returns:
        For each batch one file a sequence, holding `hidden`, float32 [L, hidden_size].
    """
    tick, hooks = progress or (lambda _done, _total: None), hooks or LayerHooks()
    depth = int(weights.args.num_hidden_layers)
    passes = [_Pass(weights, batch) for batch in batches]
    first = min(batch_pass.first_layer() for batch_pass in passes)
    # Whoever finishes layers may not have finished these: states are kept before the hook returns.
    for index in range(first):
        hooks.after_layer(index)
    if first == 0:
        hooks.before_layer(0)  # it fetches the shards that hold the embeddings, too
    for batch_pass in passes:
        batch_pass.embed()
    for index in range(first, depth):
        started = time.monotonic()
        hooks.before_layer(index)
        _pass_layer(weights, passes, index)
        hooks.after_layer(index)
        # Only now: the hook compares the states before the layer with those after it.
        for batch_pass in passes:
            batch_pass.states.forget_before(index)
        tick(index + 1, depth)
        log.info(
            "streamed: layer %d of %d of %s (%.1f s)",
            index + 1,
            depth,
            weights.checkpoint.source.uri,
            time.monotonic() - started,
        )
    return [batch_pass.finish(depth - 1) for batch_pass in passes]


def _pass_layer(weights: Weights, passes: "Sequence[_Pass]", index: int) -> None:
    """Bring every wave of every batch through a layer."""
    layer = weights.layer(index)
    # Waves of one number go together: an expert that several batches chose is read once for them.
    for wave in range(max(batch_pass.waves for batch_pass in passes)):
        steps = [
            step
            for batch_pass in passes
            if (step := batch_pass.attend(layer, index, wave)) is not None
        ]
        chosen = {int(expert) for step in steps for expert in np.unique(step.chosen)}
        for expert, matrices in weights.experts(index, sorted(chosen)):
            for step in steps:
                step.add_expert(index, expert, matrices)
        for step in steps:
            step.save(index, wave)
        mx.clear_cache()


@dataclass
class LayerStep:
    """A wave of a batch in one layer, after attention: what its feed-forward still adds to.

    Attributes:
        batch_pass: the batch's pass.
        hidden: after attention, [tokens, hidden_size].
        normed: input of the feed-forward, likewise.
        out: sum of the feed-forward's outputs so far, likewise.
        chosen: each token's experts, [tokens, num_experts_per_tok]; nothing in a dense layer.
        shares: weights of the experts' outputs, likewise.
        topk: selections for the next layer, by their names.
    """

    batch_pass: "_Pass"
    hidden: Floats
    normed: Floats
    out: Floats
    chosen: NDArray[np.int64]
    shares: Floats
    topk: dict[str, NDArray[Any]]

    def add_expert(self, index: int, expert: int, matrices: Sequence[mx.array]) -> None:
        """Add an expert's output for the tokens that chose it."""
        token, slot = np.nonzero(self.chosen == expert)
        variant, hooks = self.batch_pass.variant, self.batch_pass.hooks
        if len(token) and variant:
            matrices = variant.variant_expert(index, expert, matrices)
        for first in range(0, len(token), MLP_ROWS):
            part = token[first : first + MLP_ROWS]
            share = self.shares[part, slot[first : first + MLP_ROWS]]
            x = mx.array(self.normed[part])
            gate, up, down = matrices
            middle = nn.silu(product(x, gate)) * product(x, up)
            if hooks:
                hooks.on_expert(index, expert, x, middle)
            self.out[part] += np.array(product(middle, down) * mx.array(share)[:, None])

    def save(self, index: int, wave: int) -> None:
        """Write the states after the layer."""
        self.hidden += self.out
        # What was recorded is kept first: a wave whose states stand is never computed again.
        if self.batch_pass.hooks:
            self.batch_pass.hooks.after_wave(index, wave)
        save_arrays(self.batch_pass.states.path(index, wave), self.topk | {"hidden": self.hidden})


class _Pass:
    """A batch's pass through the layers, and how far it has come."""

    def __init__(self, weights: Weights, batch: TokenBatch) -> None:
        self.hooks = batch.hooks
        self.variant = batch.variant
        self._weights = weights
        self._sequences = batch.sequences
        self._waves = batch.plan.waves
        self._folder = batch.folder
        # States of another division into waves do not fit; they go when the pass is done.
        division = fingerprint([list(wave) for wave in self._waves])[:8]
        self.states = Activations(batch.folder / f"{_STATES}{division}", len(self._waves))
        self._next = 0
        self._embedded = False
        # "cached" tells the runtime that it may wait for one block before it begins the next.
        self._span = weights.runtime.Span.of(None)._replace(cached=True)

    @property
    def waves(self) -> int:
        """How many waves there are."""
        return len(self._waves)

    def first_layer(self) -> int:
        """Return the first layer that not all waves have passed."""
        passed = self.states.passed()
        self._embedded = passed is not None
        self._next = 0 if passed is None else passed + 1
        return self._next

    def embed(self) -> None:
        """Make the states before the first layer, where there are none."""
        if self._embedded:
            return
        for wave, members in enumerate(self._waves):
            tokens = np.concatenate([self._sequences[number] for number in members])
            hidden = (self.variant or self._weights).embed(tokens)
            save_arrays(self.states.path(-1, wave), {"hidden": hidden})

    def attend(self, layer: Any, index: int, wave: int) -> LayerStep | None:
        """Bring a wave through a layer's attention; None if there is nothing left to do."""
        if index < self._next or wave >= self.waves or self.states.has(index, wave):
            return None
        if self.variant:
            layer = self.variant.variant_layer(index, layer)
        if self.hooks:
            self.hooks.attach(layer, index)
        before = load_arrays(self.states.path(index - 1, wave))
        step = self._attend(layer, index, before, self.members(wave))
        if self.hooks:
            self.hooks.detach()
        # Freed buffers stay with MLX otherwise, and the next layer's come on top of them.
        mx.clear_cache()
        return step

    def _attend(
        self,
        layer: Any,
        index: int,
        before: dict[str, NDArray[Any]],
        members: Sequence[tuple[int, slice]],
    ) -> LayerStep:
        """Compute attention and whatever of the feed-forward needs no routed expert."""
        hidden: Floats = before["hidden"]
        normed = np.empty_like(hidden)
        schedule = self._weights.args.schedule
        # Only a shared layer reads the selection; a full one makes its own.
        needed = index + 1 < len(schedule) and schedule[index + 1] == "shared"
        after: dict[str, NDArray[Any]] = {}
        for number, rows in members:
            name = f"topk.{number}"
            last_topk = mx.array(before[name])[None] if name in before else None
            x = mx.array(hidden[rows])[None]
            out, topk = layer.self_attn(layer.input_layernorm(x), self._span, None, last_topk)
            middle = x + out
            hidden[rows] = np.array(middle[0])
            normed[rows] = np.array(layer.post_attention_layernorm(middle)[0])
            if needed and topk is not None:
                after[name] = np.array(topk[0])
        mx.clear_cache()
        mlp = layer.mlp
        if not self._weights.args.sparse_layers[index]:
            no_experts = np.empty((len(hidden), 0), np.int64)
            no_shares = np.empty((0, 0), np.float32)
            return LayerStep(
                self, hidden, normed, by_rows(mlp, normed), no_experts, no_shares, after
            )
        chosen, shares = route(mlp.gate, normed)
        shared = "shared_experts" in mlp
        out = by_rows(mlp.shared_experts, normed) if shared else np.zeros_like(normed)
        return LayerStep(self, hidden, normed, out, chosen, shares, after)

    def members(self, wave: int) -> list[tuple[int, slice]]:
        """Return each sequence of a wave and its rows in the wave's states."""
        members = self._waves[wave]
        rows = _consecutive_slices([len(self._sequences[number]) for number in members])
        return list(zip(members, rows, strict=True))

    def probe(
        self, index: int, before: dict[str, NDArray[Any]], members: Sequence[tuple[int, slice]]
    ) -> Floats:
        """Return the hidden states after a layer, and keep nothing."""
        step = self._attend(self._weights.layer(index), index, before, members)
        chosen = [int(expert) for expert in np.unique(step.chosen)]
        for expert, matrices in self._weights.experts(index, chosen):
            step.add_expert(index, expert, matrices)
        mx.clear_cache()
        return step.hidden + step.out

    def finish(self, last: int) -> list[Path]:
        """Write the final hidden states; returns their files."""
        norm = (self.variant or self._weights).norm()
        for wave in range(len(self._waves)):
            hidden = load_arrays(self.states.path(last, wave))["hidden"]
            for number, rows in self.members(wave):
                save_arrays(
                    sequence_path(self._folder, number), {"hidden": by_rows(norm, hidden[rows])}
                )
        return [sequence_path(self._folder, number) for number in range(len(self._sequences))]


@dataclass(frozen=True)
class LayerGap:
    """How far a layer with other weights is from the one that was passed, on the same inputs.

    Attributes:
        tokens: how many.
        gap: Σ|ŷ - y|² over them, y being the hidden states after the layer.
        output: Σ|y|².
        added: Σ|y - x|², what the layer itself gives.
    """

    tokens: int
    gap: float
    output: float
    added: float


def layer_gap(weights: Weights, batch: TokenBatch, index: int, sequences: int) -> LayerGap | None:
    """Let some of a batch's sequences pass a layer with other weights, from the states before it.

    Args:
        weights: the other ones.
        batch: has passed the layer; its states before it must still be there.
        index: which layer.
        sequences: at most so many of the first wave, evenly spaced.

    Returns:
        How far it is; None where the states are gone.
    """
    batch_pass = _Pass(weights, replace(batch, hooks=None))
    if not (batch_pass.states.has(index - 1, 0) and batch_pass.states.has(index, 0)):
        return None
    members = batch_pass.members(0)
    members = members[:: -(-len(members) // sequences)]
    before, after = (load_arrays(batch_pass.states.path(at, 0)) for at in (index - 1, index))
    x, y = (np.concatenate([a["hidden"][rows] for _, rows in members]) for a in (before, after))
    places = _consecutive_slices([rows.stop - rows.start for _, rows in members])
    passed = batch_pass.probe(
        index,
        before | {"hidden": x.copy()},
        [(number, place) for (number, _), place in zip(members, places, strict=True)],
    )
    squares = (np.square(d, dtype=np.float64).sum() for d in (passed - y, y, y - x))
    return LayerGap(len(y), *map(float, squares))


def _consecutive_slices(lengths: Sequence[int]) -> list[slice]:
    """Return the slices of parts of some lengths within their concatenation."""
    ends = list(accumulate(lengths))
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def by_rows(module: Callable[[mx.array], mx.array], x: Floats) -> Floats:
    """Apply a module to rows, `MLP_ROWS` at a time, and return its outputs."""
    parts = [
        np.array(module(mx.array(x[first : first + MLP_ROWS])))
        for first in range(0, len(x), MLP_ROWS)
    ]
    return np.concatenate(parts)


def route(gate: Any, x: Floats) -> tuple[NDArray[np.int64], Floats]:
    """Return the chosen experts and their shares, both [tokens, num_experts_per_tok]."""
    chosen: list[NDArray[np.int64]] = []
    shares: list[Floats] = []
    for first in range(0, len(x), MLP_ROWS):
        experts, weights = gate(mx.array(x[first : first + MLP_ROWS]))
        chosen.append(np.array(experts).astype(np.int64))
        shares.append(np.array(weights))
    return np.concatenate(chosen), np.concatenate(shares)
