"""Whole-model logits, for models that fit into memory.

Here the runtime runs as a user runs it, in one call, in chunks with a cache, and token by token.
Its hidden states drift from the reference's by rounding, so a tie (see `measures.ties`) may be
decided otherwise and then moves logits by far more than rounding. Where that happens, and only
there, the runtime is made to follow the reference's choice, and the row is counted: so the bound
holds at every position and hides nothing.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from pydantic import BaseModel, ConfigDict

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.parity.candidate import load_unquantized, logits_of
from glm_quant.parity.measures import Array, causal, relative_error, ties
from glm_quant.parity.reference import LayerOutcome, ReferenceLayers, ReferenceModel

_DECODED = 16


class LogitParity(BaseModel):
    """The runtime's logits on the source's weights, in float32, against the reference's.

    Errors are max |ours - reference| / max |reference|.

    Attributes:
        below_topk: At positions that see at most index_topk keys, in one call.
        above_topk: At the positions after those, in one call.
        cached: At all positions, prefilled in chunks and decoded token by token at the end.
        tied: Rows of all layers in which a tie was decided as the reference did, both runs.
        wrong: Rows whose keys or experts differ by more than a tie, both runs.
    """

    model_config = ConfigDict(frozen=True)

    below_topk: float
    above_topk: float
    cached: float
    tied: int = 0
    wrong: int = 0


def whole_logits(
    source: Path, output: Path, tokens: Array, outcomes: list[LayerOutcome]
) -> LogitParity:
    """Compare logits in one call, and in chunks with a cache and decoding.

    Args:
        source: Folder of the checkpoint.
        output: Folder of the build, for its runtime.
        tokens: Token ids, [L], more than index_topk.
        outcomes: The reference's layers on these tokens.
    """
    reference = ReferenceModel(source).logits(tokens)
    model = load_unquantized(source, output)
    topk = model.args.index_topk
    followers = follow(model, outcomes)
    logits = logits_of(model, tokens)
    decoded = min(_DECODED, len(tokens) - topk)
    first = (len(tokens) - decoded) // 2
    chunks = [first, len(tokens) - decoded - first, *[1] * decoded]
    for follower in followers:
        follower.row = 0
    cached = logits_of(model, tokens, chunks)
    return LogitParity(
        below_topk=relative_error(logits[:topk], reference[:topk]),
        above_topk=relative_error(logits[topk:], reference[topk:]),
        cached=relative_error(cached, reference),
        tied=sum(f.tied for f in followers),
        wrong=sum(f.wrong for f in followers),
    )


def reference_outcomes(source: Checkpoint, tokens: Array) -> list[LayerOutcome]:
    """Run the reference's layers one after the other and keep them all."""
    layers = ReferenceLayers(source)
    hidden, topk = layers.embed(tokens), None
    outcomes: list[LayerOutcome] = []
    for index in range(layers.config.num_hidden_layers):
        outcomes.append(layers.run(index, hidden, topk))
        hidden, topk = outcomes[-1].output, outcomes[-1].topk
    return outcomes


def follow(model: Any, outcomes: list[LayerOutcome]) -> list["Follower"]:
    """Make a model decide ties as the reference did; returns the counters."""
    followers: list[Follower] = []
    for layer, outcome in zip(model.layers, outcomes, strict=True):
        if "indexer" in layer.self_attn:
            followers.append(KeyFollower(layer.self_attn.indexer, outcome))
            layer.self_attn.indexer.select = followers[-1]
        if "gate" in layer.mlp:
            followers.append(ExpertFollower(layer.mlp["gate"], outcome))
            layer.mlp.gate = followers[-1]
    return followers


class Follower:
    """Stands before a choice, counts where it differs from the reference's, and settles ties."""

    def __init__(self, chooser: Any, outcome: LayerOutcome) -> None:
        """Remember whose choice to watch and what the reference chose."""
        self.chooser = chooser
        self.outcome = outcome
        self.row = 0
        self.tied = 0
        self.wrong = 0

    def settle(self, candidate: Array, reference: Array, scores: Any) -> Array:
        """Count differing rows, and return those that are ties.

        Args:
            candidate: Our choices, [L, k], for the rows from `row` on.
            reference: The reference's, likewise.
            scores: Returns the scores and magnitudes of all rows.
        """
        differs = (np.sort(candidate) != np.sort(reference)).any(axis=-1)
        if not differs.any():
            return differs
        rows = slice(self.row, self.row + len(candidate))
        tied = differs & ties(candidate, reference, *(part[rows] for part in scores()))
        self.tied += int(tied.sum())
        self.wrong += int((differs & ~tied).sum())
        return tied


class KeyFollower(Follower):
    """Watches an indexer's `select`."""

    def __call__(self, x: mx.array, q_latent: mx.array, keys: mx.array, span: Any) -> mx.array:
        """Select keys, [1, L, K]."""
        self.row = int(span.past)
        topk = type(self.chooser).select(self.chooser, x, q_latent, keys, span)
        candidate = np.array(topk[0]).astype(np.int64)
        reference = self.outcome.topk[self.row : self.row + len(candidate)]
        tied = self.settle(causal(candidate, self.row), reference, self.outcome.index_scores)
        # Rows that see too few keys were filled up with invisible ones, and never differ by a tie.
        return mx.array(np.where(tied[:, None], reference, candidate))[None]


class ExpertFollower(Follower):
    """Watches a router."""

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Choose experts and their weights, both [1, L, num_experts_per_tok]."""
        chosen, weights = self.chooser(x)
        candidate = np.array(chosen[0]).astype(np.int64)
        every = self.outcome.experts
        reference = candidate if every is None else every[self.row : self.row + len(candidate)]
        tied = self.settle(candidate, reference, self.outcome.expert_scores)
        self.row += len(candidate)
        if not tied.any():
            return chosen, weights
        bias = self.chooser.e_score_correction_bias
        push = np.zeros((len(candidate), bias.size), np.float32)
        np.put_along_axis(push, reference, 2.0, axis=-1)  # above any sigmoid
        self.chooser.e_score_correction_bias = bias + mx.array(push * tied[:, None])
        result = self.chooser(x)
        self.chooser.e_score_correction_bias = bias
        return result
