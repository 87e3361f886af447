"""Loops and repeats in long greedy outputs, where a model with too few bits gives itself away.

A small or untuned model loops in greedy decoding without any
quantization, so bounds on loops are for models whose source does not.
"""

from collections.abc import Callable, Sequence
from typing import Any

from glm_quant.evaluation.records import Coherence, LongOutput
from glm_quant.evaluation.replies import chat_ids, greedy
from glm_quant.settings import CoherenceSettings

# An end counts as a loop when it repeats itself so many times, over so many tokens at least.
LOOP_TURNS = 4
LOOP_TOKENS = 32

_TEXT_ENDS = 1000


def measure_coherence(
    model: Any,
    tokenizer: Any,
    settings: CoherenceSettings,
    progress: Callable[[int], None] | None = None,
) -> Coherence:
    """Let a model write at length, and count what repeats.

    Args:
        model: a model of mlx-lm.
        tokenizer: its tokenizer, with a chat template.
        settings: prompts, length, what counts as a repeat.
        progress: called with the tokens that the last output might have had.
    """
    outputs: list[LongOutput] = []
    for prompt in settings.prompts:
        ids = chat_ids(tokenizer, prompt, thinking=False)
        reply_ids, ended = greedy(model, tokenizer, ids, settings.tokens)
        outputs.append(
            LongOutput(
                prompt=prompt,
                tokens=len(reply_ids),
                ended=ended,
                repeated_share=repeated_share(reply_ids, settings.ngram),
                longest_repeat=longest_repeat(reply_ids),
                loop_period=loop_period(reply_ids),
                text=_shortened(tokenizer.decode(reply_ids)),
            )
        )
        if progress:
            progress(settings.tokens)
    return Coherence(
        ngram=settings.ngram,
        method=(
            f"{len(outputs)} greedy outputs of at most {settings.tokens:,} tokens, chat template "
            f"with thinking off; repeats are {settings.ngram}-grams that stood before; a loop is "
            f"an end that repeats itself {LOOP_TURNS} times over {LOOP_TOKENS} tokens or more"
        ),
        outputs=outputs,
    )


def repeated_share(tokens: Sequence[int], ngram: int) -> float:
    """Return the share of n-grams that stood before; 0 where there is none."""
    count = len(tokens) - ngram + 1
    if count < 1:
        return 0.0
    return 1 - len({tuple(tokens[i : i + ngram]) for i in range(count)}) / count


def longest_repeat(tokens: Sequence[int]) -> int:
    """Return the length of the longest span that occurs twice; its two places may overlap."""
    low, high = 0, max(len(tokens) - 1, 0)
    while low < high:  # what holds for a length holds for all shorter ones
        middle = (low + high + 1) // 2
        low, high = (middle, high) if _occurs_twice(tokens, middle) else (low, middle - 1)
    return low


def loop_period(tokens: Sequence[int]) -> int | None:
    """Return the shortest period of the end of an output; None where it does not loop."""
    for period in range(1, len(tokens) // LOOP_TURNS + 1):
        length = max(LOOP_TURNS * period, LOOP_TOKENS)
        if length > len(tokens):
            continue
        end = tokens[-length:]
        if end[period:] == end[:-period]:
            return period
    return None


def _occurs_twice(tokens: Sequence[int], length: int) -> bool:
    windows: set[tuple[int, ...]] = set()
    for begin in range(len(tokens) - length + 1):
        span = tuple(tokens[begin : begin + length])
        if span in windows:
            return True
        windows.add(span)
    return False


def _shortened(text: str) -> str:
    if len(text) <= 2 * _TEXT_ENDS:
        return text
    return f"{text[:_TEXT_ENDS]} […] {text[-_TEXT_ENDS:]}"
