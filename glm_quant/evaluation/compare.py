"""Two models' next-token distributions, compared exactly, with a part of the vocabulary at a time.

From final hidden states and the rows of both output heads, one pass over the vocabulary keeps for
each position the running maximum and sum of exponentials of both models (as flash attention does,
arXiv:2205.14135) and the running sum of p · (logit of p - logit of q). So no position ever has all
of its logits in memory, and nothing is cut off: this KL is over the whole vocabulary. Sums are kept
in float64; a block's own sums are float32.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.model.precision import require_float32
from glm_quant.streaming.memory_plan import LOGIT_COLUMNS, LOGIT_ROWS
from glm_quant.streaming.products import product
from glm_quant.streaming.weights import Floats, Weights

Doubles = NDArray[np.float64]


@dataclass
class _Side:
    """One model's running sums, each [positions]."""

    size: int
    largest: Doubles = field(init=False)
    total: Doubles = field(init=False)
    best: NDArray[np.int64] = field(init=False)
    wanted: Doubles = field(init=False)

    def __post_init__(self) -> None:
        self.largest = np.full(self.size, -np.inf)
        self.total = np.zeros(self.size)
        self.best = np.zeros(self.size, np.int64)
        self.wanted = np.full(self.size, np.nan)

    @property
    def log_total(self) -> Doubles:
        return self.largest + np.log(self.total)

    def add(
        self, rows: slice, logits: mx.array, first: int, targets: NDArray[np.int64]
    ) -> tuple[Doubles, Doubles]:
        """Take in a block of logits [R, C].

        Returns:
            The factors by which sums so far, and sums relative to the block's maximum, are to be
            scaled from here on.
        """
        block_largest = np.array(mx.max(logits, axis=-1)).astype(np.float64)
        block_total = np.array(
            mx.sum(mx.exp(logits - mx.max(logits, axis=-1, keepdims=True)), axis=-1)
        )
        best = np.array(mx.argmax(logits, axis=-1)).astype(np.int64) + first
        old = self.largest[rows]
        new = np.maximum(old, block_largest)
        before, now = np.exp(old - new), np.exp(block_largest - new)
        self.best[rows] = np.where(block_largest > old, best, self.best[rows])
        self.total[rows] = self.total[rows] * before + block_total * now
        self.largest[rows] = new
        target_rows = np.flatnonzero(
            (targets[rows] >= first) & (targets[rows] < first + logits.shape[1])
        )
        if target_rows.size:
            column = mx.array(targets[rows][target_rows] - first)
            values = np.array(logits[mx.array(target_rows), column])
            self.wanted[rows.start + target_rows] = values
        return before, now


@dataclass(frozen=True)
class Positions:
    """What is known of each position, each [positions].

    Attributes:
        kl: KL(reference ‖ build) in nats.
        agrees: whether both name the same most likely token.
        reference_nll: the reference's loss on the token that follows, in nats; NaN at the end.
        build_nll: the build's.
    """

    kl: Doubles
    agrees: NDArray[np.bool_]
    reference_nll: Doubles
    build_nll: Doubles


def compare_states(
    reference: tuple[Weights, Floats], build: tuple[Weights, Floats], targets: NDArray[np.int64]
) -> Positions:
    """Compare at every position.

    Args:
        reference: its weights, for the output head, and its final states [positions, hidden_size].
        build: likewise.
        targets: the tokens that follow, [positions]; -1 where none does.
    """
    require_float32()
    (p_weights, p_states), (q_weights, q_states) = reference, build
    size, vocabulary = len(targets), int(p_weights.args.vocab_size)
    p, q = _Side(size), _Side(size)
    weighted = np.zeros(size)
    for first in range(0, vocabulary, LOGIT_COLUMNS):
        count = min(LOGIT_COLUMNS, vocabulary - first)
        heads = [weights.head(first, count) for weights in (p_weights, q_weights)]
        mx.eval(heads)
        for begin in range(0, size, LOGIT_ROWS):
            rows = slice(begin, min(begin + LOGIT_ROWS, size))
            p_logits = product(mx.array(p_states[rows]), heads[0])
            q_logits = product(mx.array(q_states[rows]), heads[1])
            mx.eval(p_logits, q_logits)
            odds = mx.exp(p_logits - mx.max(p_logits, axis=-1, keepdims=True))
            gap = np.array(mx.sum(odds * (p_logits - q_logits), axis=-1))
            before, now = p.add(rows, p_logits, first, targets)
            q.add(rows, q_logits, first, targets)
            weighted[rows] = weighted[rows] * before + gap * now
    kl = weighted / p.total - p.log_total + q.log_total
    return Positions(
        kl=np.maximum(kl, 0),  # rounding may take it below
        agrees=p.best == q.best,
        reference_nll=p.log_total - p.wanted,
        build_nll=q.log_total - q.wanted,
    )


def targets_of(sequences: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Return the token that follows each position, -1 at each sequence's end."""
    return np.concatenate([np.append(sequence[1:], -1) for sequence in sequences])
