"""Strided perplexity: windows of `context` tokens, each moved on by `stride`, scored where new.

Every token but the first is scored exactly once, and (after the first window) with at least
`context - stride` tokens before it. Losses of neighbouring tokens
are not independent, so the standard error is taken from the windows and not from the tokens.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import mlx.core as mx

from glm_quant.evaluation.records import Perplexity

# Rows of logits that are in float32 at a time: 160 MB for a vocabulary of 154,880.
_ROWS = 256


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` are read, those from `first` on are scored."""

    begin: int
    first: int
    end: int


def windows(tokens: int, context: int, stride: int) -> Iterator[Window]:
    """Yield the windows over a text of `tokens` tokens; token 0 is given, never scored."""
    scored = 1
    for begin in range(0, tokens, stride):
        end = min(begin + context, tokens)
        if scored < end:
            yield Window(begin, scored, end)
        scored = end
        if end == tokens:
            return


def measure_perplexity(
    model: Any,
    tokens: Sequence[int],
    *,
    context: int,
    stride: int,
    text: str,
    text_sha256: str,
    progress: Callable[[int], None] | None = None,
) -> Perplexity:
    """Score a text.

    Args:
        model: maps token ids [1, L] to logits [1, L, vocab_size].
        tokens: the text's ids, at least two.
        context: tokens in a window.
        stride: tokens from window to window, less than `context`.
        text: the text's name, for the record.
        text_sha256: the text's digest, for the record.
        progress: called with the number of tokens scored since the last call.
    """
    ids = mx.array(list(tokens))
    parts: list[tuple[float, int]] = []
    for window in windows(len(tokens), context, stride):
        loss = window_loss(model, ids, window)
        parts.append((loss, window.end - window.first))
        if progress:
            progress(window.end - window.first)
    mean, error = mean_with_error(parts)
    value = math.exp(mean)
    return Perplexity(
        text=text,
        text_sha256=text_sha256,
        tokens=len(tokens),
        scored_tokens=sum(count for _, count in parts),
        context=context,
        stride=stride,
        windows=len(parts),
        mean_nll=mean,
        value=value,
        standard_error=None if error is None else value * error,
        method=(
            f"strided: windows of {context:,} tokens moved on by {stride:,}, every token but the "
            "first scored once; the standard error is clustered by window"
        ),
        window_nll=[loss for loss, _ in parts],
        window_tokens=[count for _, count in parts],
    )


def window_loss(model: Any, ids: mx.array, window: Window) -> float:
    """Return the summed negative log-likelihood of a window's scored tokens, in nats."""
    logits = model(ids[window.begin : window.end][None])[0]
    total = 0.0
    for first in range(window.first, window.end, _ROWS):
        last = min(first + _ROWS, window.end)
        # The token at t is predicted by the logits at t - 1.
        rows = logits[first - window.begin - 1 : last - window.begin - 1].astype(mx.float32)
        target_logits = mx.take_along_axis(rows, ids[first:last, None], axis=-1)[:, 0]
        total += cast("float", mx.sum(mx.logsumexp(rows, axis=-1) - target_logits).item())
    return total


def mean_with_error(parts: Sequence[tuple[float, int]]) -> tuple[float, float | None]:
    """Return the mean loss per token and its standard error, from (sum, tokens) of each window.

    The error is that of a ratio of sums over clusters (Cochran, Sampling Techniques, 3rd ed., 6.4):
    k / (k - 1) · Σ (sᵢ - mean · nᵢ)² / (Σ nᵢ)².
    """
    count = sum(tokens for _, tokens in parts)
    mean = sum(loss for loss, _ in parts) / count
    k = len(parts)
    if k < 2:
        return mean, None
    scatter = sum((loss - mean * tokens) ** 2 for loss, tokens in parts)
    return mean, math.sqrt(k / (k - 1) * scatter) / count


def digest_text(text: str) -> str:
    """Return the sha256 of a text in UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
