"""A whole model's forward pass with one layer in memory, and of its routed experts one at a time.

All sequences pass a layer before the next one is read, so each weight is read once however many
tokens there are. Attention takes sequence by sequence; the feed-forward takes the tokens of all
sequences of a wave, grouped by the expert that they chose. What a reader would get wrong: a shared
layer attends to the keys that the last full layer selected, so selections travel with the hidden
states from layer to layer, on disk too.
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from numpy.typing import NDArray

from glm_quant.evaluation.activations import Activations, load_arrays, save_arrays
from glm_quant.evaluation.memory_plan import MLP_ROWS, MemoryPlan
from glm_quant.evaluation.products import product
from glm_quant.evaluation.weights import Floats, Weights
from glm_quant.fingerprint import fingerprint
from glm_quant.model.precision import require_float32

log = logging.getLogger(__name__)


class Watching(Protocol):
    """Whoever wants to see what passes through the layers; calls come in the order of compute."""

    def watch(self, layer: Any, index: int) -> None:
        """Note that a layer was loaded; may put listeners into it."""
        ...

    def routed(self, index: int, expert: int, x: mx.array, middle: mx.array) -> None:
        """Note an expert's tokens [tokens, hidden_size] and what its down projection meets."""
        ...

    def passed(self, index: int, wave: int) -> None:
        """Note that a wave has passed a layer; its states are kept after this returns."""
        ...


Tokens = NDArray[np.int64]
Progress = Callable[[int, int], None]


_STATES = "states-"


def forget_states(folder: Path) -> None:
    """Delete the states between layers; call it when what the pass was for is recorded."""
    for path in folder.glob(f"{_STATES}*"):
        shutil.rmtree(path)


def sequence_path(folder: Path, number: int) -> Path:
    """Return where the final hidden states of a sequence stand."""
    return folder / f"sequence-{number:04d}.safetensors"


def stream_states(
    weights: Weights,
    sequences: Sequence[Tokens],
    plan: MemoryPlan,
    folder: Path,
    progress: Progress | None = None,
    watching: Watching | None = None,
) -> list[Path]:
    """Write the final hidden states of some sequences, after the last norm.

    A call that was interrupted is gone on with at the layer, and within it at the wave.

    Args:
        weights: the model's.
        sequences: token ids, each [L].
        plan: which sequences go through a layer together.
        folder: where the files go, ours alone; the states on the way lie inside it until
            `forget_states`.
        progress: called with layers done and layers to do.
        watching: sees what was not passed before an interruption.

    Returns:
        One file a sequence, holding `hidden`, float32 [L, hidden_size].
    """
    run = _Pass(weights, sequences, plan, folder, watching).run
    return run(progress or (lambda _done, _total: None))


class _Pass:
    def __init__(
        self,
        weights: Weights,
        sequences: Sequence[Tokens],
        plan: MemoryPlan,
        folder: Path,
        watching: Watching | None,
    ) -> None:
        require_float32()
        self._watching = watching
        self._weights = weights
        self._sequences = sequences
        self._waves = plan.waves
        self._folder = folder
        # States of another division into waves do not fit; they go when the pass is done.
        division = fingerprint([list(wave) for wave in plan.waves])[:8]
        self._states = Activations(folder / f"{_STATES}{division}", len(plan.waves))
        # "cached" tells the runtime that it may wait for one block before it begins the next.
        self._span = weights.runtime.Span.of(None)._replace(cached=True)

    def run(self, progress: Progress) -> list[Path]:
        """Go through what is left of the layers."""
        depth = int(self._weights.args.num_hidden_layers)
        passed = self._states.passed()
        if passed is None:
            passed = -1
            self._embed()
        for index in range(passed + 1, depth):
            started = time.monotonic()
            self._layer(index)
            self._states.forget_before(index)
            progress(index + 1, depth)
            log.info(
                "divergence: layer %d of %d of %s (%.1f s)",
                index + 1,
                depth,
                self._weights.checkpoint.source.uri,
                time.monotonic() - started,
            )
        return self._finish(depth - 1)

    def _embed(self) -> None:
        for wave, members in enumerate(self._waves):
            tokens = np.concatenate([self._sequences[number] for number in members])
            hidden = self._weights.embed(tokens)
            save_arrays(self._states.path(-1, wave), {"hidden": hidden})

    def _layer(self, index: int) -> None:
        layer = self._weights.layer(index)
        if self._watching:
            self._watching.watch(layer, index)
        for wave in range(len(self._waves)):
            if not self._states.has(index, wave):
                before = load_arrays(self._states.path(index - 1, wave))
                after = self._advance(layer, index, wave, before)
                if self._watching:
                    self._watching.passed(index, wave)
                save_arrays(self._states.path(index, wave), after)
                mx.clear_cache()

    def _advance(
        self, layer: Any, index: int, wave: int, before: dict[str, NDArray[Any]]
    ) -> dict[str, NDArray[Any]]:
        """Return a wave's states after a layer from those before it."""
        hidden: Floats = before["hidden"]
        normed = np.empty_like(hidden)
        schedule = self._weights.args.schedule
        needed = index + 1 < len(schedule) and schedule[index + 1] == "shared"
        after: dict[str, NDArray[Any]] = {}
        for number, rows in self._members(wave):
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
        if self._weights.args.sparse_layers[index]:
            hidden += self._mixture(layer.mlp, index, normed)
        else:
            hidden += by_rows(layer.mlp, normed)
        return after | {"hidden": hidden}

    def _mixture(self, moe: Any, index: int, x: Floats) -> Floats:
        """Return the output of routed and shared experts, [tokens, hidden_size]."""
        chosen, shares = route(moe.gate, x)
        out = by_rows(moe.shared_experts, x) if "shared_experts" in moe else np.zeros_like(x)
        for expert, matrices in self._weights.experts(index, np.unique(chosen).tolist()):
            token, slot = np.nonzero(chosen == expert)
            for first in range(0, len(token), MLP_ROWS):
                part = token[first : first + MLP_ROWS]
                share = shares[part, slot[first : first + MLP_ROWS]]
                given = mx.array(x[part])
                gate, up, down = matrices
                middle = nn.silu(product(given, gate)) * product(given, up)
                if self._watching:
                    self._watching.routed(index, expert, given, middle)
                out[part] += np.array(product(middle, down) * mx.array(share)[:, None])
        return out

    def _members(self, wave: int) -> list[tuple[int, slice]]:
        """Return each sequence of a wave and its rows in the wave's states."""
        members = self._waves[wave]
        ends = list(accumulate(len(self._sequences[number]) for number in members))
        return [
            (number, slice(begin, end))
            for number, begin, end in zip(members, [0, *ends], ends, strict=False)
        ]

    def _finish(self, last: int) -> list[Path]:
        norm = self._weights.norm()
        for wave in range(len(self._waves)):
            hidden = load_arrays(self._states.path(last, wave))["hidden"]
            for number, rows in self._members(wave):
                save_arrays(
                    sequence_path(self._folder, number), {"hidden": by_rows(norm, hidden[rows])}
                )
        return [sequence_path(self._folder, number) for number in range(len(self._sequences))]


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
