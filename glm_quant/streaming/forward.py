"""A whole model's forward pass with one layer in memory, and of its routed experts one at a time.

All sequences pass a layer before the next one is read, so each weight is read once however many
tokens there are. Attention takes sequence by sequence; the feed-forward takes the tokens of all
sequences of a wave, grouped by the expert that they chose. Several *parties* may walk together,
each with tokens, waves and files of its own, and some with weights that differ here and there: they
share the reading of weights and nothing else, so each ends with the bytes that it would have had
alone. What a reader would get wrong: a shared layer attends to the keys that the last full layer
selected, so selections travel with the hidden states from layer to layer, on disk too.
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
from glm_quant.streaming.memory_plan import MLP_ROWS, MemoryPlan
from glm_quant.streaming.products import product
from glm_quant.streaming.walking import Host, Tokens, Variant, Watching
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
class Party:
    """Some sequences on their way through the layers.

    Attributes:
        sequences: token ids, each [L].
        plan: which of them go through a layer at a time.
        folder: where the files go, the party's alone; the states on the way lie inside it until
            `forget_states`.
        watching: sees what was not passed before an interruption.
        variant: its own weights, where they are not those that all share.
    """

    sequences: Sequence[Tokens]
    plan: MemoryPlan
    folder: Path
    watching: Watching | None = None
    variant: Variant | None = None


def stream_states(
    weights: Weights,
    sequences: Sequence[Tokens],
    plan: MemoryPlan,
    folder: Path,
    progress: Progress | None = None,
) -> list[Path]:
    """Write the final hidden states of some sequences: `stream_together` of one party."""
    return stream_together(weights, [Party(sequences, plan, folder)], progress)[0]


def stream_together(
    weights: Weights,
    parties: Sequence[Party],
    progress: Progress | None = None,
    host: Host | None = None,
) -> list[list[Path]]:
    """Write the final hidden states of all sequences of all parties, after the last norm.

    A call that was interrupted is gone on with at the layer, and within it at the wave.

    Args:
        weights: the model's; read once for a wave of each party.
        parties: who walks.
        progress: called with layers done and layers to do.
        host: told of every layer.

    Returns:
        For each party one file a sequence, holding `hidden`, float32 [L, hidden_size].
    """
    tick, host = progress or (lambda _done, _total: None), host or Host()
    depth = int(weights.args.num_hidden_layers)
    passes = [_Pass(weights, party) for party in parties]
    begin = min(one.begin() for one in passes)
    for index in range(begin):
        host.leave(index)
    if begin == 0:
        host.enter(0)  # the embeddings are near too
    for one in passes:
        one.embed()
    for index in range(begin, depth):
        started = time.monotonic()
        host.enter(index)
        _pass_layer(weights, passes, index)
        host.leave(index)
        for one in passes:
            one.states.forget_before(index)
        tick(index + 1, depth)
        log.info(
            "divergence: layer %d of %d of %s (%.1f s)",
            index + 1,
            depth,
            weights.checkpoint.source.uri,
            time.monotonic() - started,
        )
    return [one.finish(depth - 1) for one in passes]


def _pass_layer(weights: Weights, passes: "Sequence[_Pass]", index: int) -> None:
    """Bring every wave of every party through a layer; waves of one number go together."""
    layer = weights.layer(index)
    for wave in range(max(one.waves for one in passes)):
        turns = [turn for one in passes if (turn := one.attend(layer, index, wave)) is not None]
        chosen = {int(expert) for turn in turns for expert in np.unique(turn.chosen)}
        for expert, matrices in weights.experts(index, sorted(chosen)):
            for turn in turns:
                turn.meet(index, expert, matrices)
        for turn in turns:
            turn.keep(index, wave)
        mx.clear_cache()


@dataclass
class _Turn:
    """A wave of a party between a layer's attention and its end.

    Attributes:
        hidden: after attention, [tokens, hidden_size].
        normed: what the feed-forward meets, likewise.
        out: what the feed-forward has given so far, likewise.
        chosen: each token's experts, [tokens, num_experts_per_tok]; nothing in a dense layer.
        shares: of what they give, likewise.
        topk: selections for the next layer, by their names.
    """

    of: "_Pass"
    hidden: Floats
    normed: Floats
    out: Floats
    chosen: NDArray[np.int64]
    shares: Floats
    topk: dict[str, NDArray[Any]]

    def meet(self, index: int, expert: int, matrices: Sequence[mx.array]) -> None:
        """Add what an expert gives to the tokens that chose it."""
        token, slot = np.nonzero(self.chosen == expert)
        if len(token) and self.of.variant:
            matrices = self.of.variant.own_expert(index, expert, matrices)
        for first in range(0, len(token), MLP_ROWS):
            part = token[first : first + MLP_ROWS]
            share = self.shares[part, slot[first : first + MLP_ROWS]]
            given = mx.array(self.normed[part])
            gate, up, down = matrices
            middle = nn.silu(product(given, gate)) * product(given, up)
            if self.of.watching:
                self.of.watching.routed(index, expert, given, middle)
            self.out[part] += np.array(product(middle, down) * mx.array(share)[:, None])

    def keep(self, index: int, wave: int) -> None:
        """Write the states after the layer."""
        self.hidden += self.out
        if self.of.watching:
            self.of.watching.passed(index, wave)
        save_arrays(self.of.states.path(index, wave), self.topk | {"hidden": self.hidden})


class _Pass:
    """A party, and how far it has come."""

    def __init__(self, weights: Weights, party: Party) -> None:
        self.watching = party.watching
        self.variant = party.variant
        self._weights = weights
        self._sequences = party.sequences
        self._waves = party.plan.waves
        self._folder = party.folder
        # States of another division into waves do not fit; they go when the pass is done.
        division = fingerprint([list(wave) for wave in self._waves])[:8]
        self.states = Activations(party.folder / f"{_STATES}{division}", len(self._waves))
        self._next = 0
        self._embedded = False
        # "cached" tells the runtime that it may wait for one block before it begins the next.
        self._span = weights.runtime.Span.of(None)._replace(cached=True)

    @property
    def waves(self) -> int:
        """How many waves there are."""
        return len(self._waves)

    def begin(self) -> int:
        """Return the layer to begin with: the first that not all waves have passed."""
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

    def attend(self, layer: Any, index: int, wave: int) -> _Turn | None:
        """Bring a wave through a layer's attention; None if there is nothing left to do."""
        if index < self._next or wave >= self.waves or self.states.has(index, wave):
            return None
        if self.variant:
            layer = self.variant.own_layer(index, layer)
        if self.watching:
            self.watching.watch(layer, index)
        before = load_arrays(self.states.path(index - 1, wave))
        turn = self._attend(layer, index, before, self.members(wave))
        if self.watching:
            self.watching.leave()
        mx.clear_cache()
        return turn

    def _attend(
        self,
        layer: Any,
        index: int,
        before: dict[str, NDArray[Any]],
        members: Sequence[tuple[int, slice]],
    ) -> _Turn:
        """Do it, and what else of the layer needs no routed expert."""
        hidden: Floats = before["hidden"]
        normed = np.empty_like(hidden)
        schedule = self._weights.args.schedule
        needed = index + 1 < len(schedule) and schedule[index + 1] == "shared"
        after: dict[str, NDArray[Any]] = {}
        for number, rows in members:
            name = f"topk.{number}"
            given = mx.array(before[name])[None] if name in before else None
            x = mx.array(hidden[rows])[None]
            out, topk = layer.self_attn(layer.input_layernorm(x), self._span, None, given)
            middle = x + out
            hidden[rows] = np.array(middle[0])
            normed[rows] = np.array(layer.post_attention_layernorm(middle)[0])
            if needed and topk is not None:
                after[name] = np.array(topk[0])
        mx.clear_cache()
        mlp = layer.mlp
        if not self._weights.args.sparse_layers[index]:
            nobody = np.empty((len(hidden), 0), np.int64)
            out = by_rows(mlp, normed)
            return _Turn(self, hidden, normed, out, nobody, np.empty((0, 0), np.float32), after)
        chosen, shares = route(mlp.gate, normed)
        shared = "shared_experts" in mlp
        out = by_rows(mlp.shared_experts, normed) if shared else np.zeros_like(normed)
        return _Turn(self, hidden, normed, out, chosen, shares, after)

    def members(self, wave: int) -> list[tuple[int, slice]]:
        """Return each sequence of a wave and its rows in the wave's states."""
        members = self._waves[wave]
        rows = _one_after_another([len(self._sequences[number]) for number in members])
        return list(zip(members, rows, strict=True))

    def probe(
        self, index: int, before: dict[str, NDArray[Any]], members: Sequence[tuple[int, slice]]
    ) -> Floats:
        """Return the hidden states after a layer, and keep nothing."""
        turn = self._attend(self._weights.layer(index), index, before, members)
        chosen = [int(expert) for expert in np.unique(turn.chosen)]
        for expert, matrices in self._weights.experts(index, chosen):
            turn.meet(index, expert, matrices)
        mx.clear_cache()
        return turn.hidden + turn.out

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


def layer_gap(weights: Weights, party: Party, index: int, sequences: int) -> LayerGap | None:
    """Let some of a party's sequences pass a layer with other weights, from the states before it.

    Args:
        weights: the other ones.
        party: has passed the layer; its states before it must still be there.
        index: which layer.
        sequences: at most so many of the first wave, evenly spaced.

    Returns:
        How far it is; None where the states are gone.
    """
    one = _Pass(weights, replace(party, watching=None))
    if not (one.states.has(index - 1, 0) and one.states.has(index, 0)):
        return None
    members = one.members(0)
    members = members[:: -(-len(members) // sequences)]
    before, after = (load_arrays(one.states.path(at, 0)) for at in (index - 1, index))
    x, y = (np.concatenate([a["hidden"][rows] for _, rows in members]) for a in (before, after))
    places = _one_after_another([rows.stop - rows.start for _, rows in members])
    passed = one.probe(
        index,
        before | {"hidden": x.copy()},
        [(number, place) for (number, _), place in zip(members, places, strict=True)],
    )
    energies = (np.square(d, dtype=np.float64).sum() for d in (passed - y, y, y - x))
    return LayerGap(len(y), *map(float, energies))


def _one_after_another(lengths: Sequence[int]) -> list[slice]:
    """Return where parts of some lengths lie in what they make together."""
    ends = list(accumulate(lengths))
    return [slice(begin, end) for begin, end in zip([0, *ends], ends, strict=False)]


def by_rows(module: Callable[[mx.array], mx.array], x: Floats) -> Floats:
    """Apply a module to rows, some at a time; returns what it makes of them."""
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
