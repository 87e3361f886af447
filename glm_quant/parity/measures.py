"""Distances between what a reference and a candidate compute.

All take numpy arrays with positions on the first axis. An error is
relative to the largest magnitude of the *whole* reference array, not element by element, since a
logit near zero has no scale of its own.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def relative_error(candidate: Array, reference: Array) -> float:
    """Return max |candidate - reference| / max |reference|; NaN anywhere gives infinity."""
    if reference.size == 0:
        return 0.0
    gap = np.abs(candidate.astype(np.float64) - reference.astype(np.float64))
    value = float(gap.max() / max(float(np.abs(reference).max()), np.finfo(np.float32).tiny))
    return value if np.isfinite(value) else float("inf")


def mean_relative_error(candidate: Array, reference: Array) -> float:
    """Return ‖candidate - reference‖ / ‖reference‖ (Frobenius)."""
    gap = np.linalg.norm(candidate.astype(np.float64) - reference.astype(np.float64))
    scale = np.linalg.norm(reference.astype(np.float64))
    return float(gap / max(float(scale), np.finfo(np.float32).tiny))


def log_softmax(logits: Array) -> Array:
    """Return log-probabilities over the last axis, in float64."""
    shifted = logits.astype(np.float64)
    shifted = shifted - shifted.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def kl_divergence(reference: Array, candidate: Array) -> Array:
    """Return KL(reference ‖ candidate) at every position, in nats.

    Args:
        reference: logits, [positions, vocab_size].
        candidate: logits, [positions, vocab_size].
    """
    p, q = log_softmax(reference), log_softmax(candidate)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def top1_agreement(reference: Array, candidate: Array) -> float:
    """Return the share of positions at which both name the same most likely token."""
    return float(np.mean(reference.argmax(axis=-1) == candidate.argmax(axis=-1)))


def overlap(candidate: Array, reference: Array) -> Array:
    """Return for each row the share of the reference's entries that the candidate holds too.

    Args:
        candidate: indices, [rows, k], each at most once per row; -1 marks no entry.
        reference: likewise.
    """
    shares = np.ones(len(reference))
    for row, (candidate_row, reference_row) in enumerate(zip(candidate, reference, strict=True)):
        visible = reference_row[reference_row >= 0]
        if visible.size:
            shares[row] = np.isin(visible, candidate_row).mean()
    return shares


# Scores are float32 sums whose terms went through a few more float32 matmuls: an error of some 1e-7
# of the magnitudes that were summed. In whole-model runs the hidden states differ by 1e-6 as well.
TIE = 1e-6


def ties(candidate: Array, reference: Array, scores: Array, sizes: Array) -> NDArray[np.bool_]:
    """Tell for each row whether two choices of the k best are equal but for ties.

    A differing entry is tied where its score is within rounding of the k-th best score.

    Args:
        candidate: Choices, [rows, k]; -1 marks no entry.
        reference: Likewise.
        scores: What was chosen by, in float64, [rows, candidates].
        sizes: Magnitudes that the scores were summed from, [rows, candidates].
    """
    verdict = np.ones(len(candidate), np.bool_)
    for row in np.flatnonzero((np.sort(candidate) != np.sort(reference)).any(axis=-1)):
        only = np.setxor1d(candidate[row], reference[row])
        k = reference.shape[1]
        threshold = np.partition(scores[row], -k)[-k]
        close = np.abs(scores[row, only] - threshold) <= TIE * sizes[row, only]
        whole = (
            len(np.unique(candidate[row])) == len(np.unique(reference[row]))
            and only.min(initial=0) >= 0
        )
        verdict[row] = whole and bool(close.all())
    return verdict


def causal(selected: Array, first_row: int = 0) -> Array:
    """Mark by -1 what a row selected from its own future, for want of visible keys.

    Args:
        selected: Key rows, [rows, k].
        first_row: Position of the first row.
    """
    rows = first_row + np.arange(len(selected))[:, None]
    return np.where(selected > rows, -1, selected)
