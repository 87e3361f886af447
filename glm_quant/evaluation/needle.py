"""Needle in a text: one fact hidden in a long prompt, to be found at every length and depth.

Prompts go through the build's own chat template, and the reply is greedy, after as much thinking as
the recipe allows. Below `index_topk` tokens every key is attended to, so only longer prompts say
anything about the indexer.
"""

from collections.abc import Callable
from typing import Any

from glm_quant.errors import EvaluationError
from glm_quant.evaluation.needle_prompts import (
    DISTRACTORS,
    PHRASINGS,
    build_needle_prompt,
    is_retrieved,
    needle_seed,
)
from glm_quant.evaluation.perplexity import digest_text
from glm_quant.evaluation.records import Needle, NeedleTrial
from glm_quant.evaluation.replies import answer_of, chat_ids, greedy
from glm_quant.settings import EvaluationSettings

_REPLY_TOKENS = 24


def measure_needle(
    model: Any,
    tokenizer: Any,
    filler: str,
    settings: EvaluationSettings,
    progress: Callable[[int], None] | None = None,
) -> Needle:
    """Ask for a hidden fact at every length and depth of the recipe.

    Args:
        model: a model of mlx-lm.
        tokenizer: its tokenizer, with a chat template.
        filler: text to hide the facts in.
        settings: lengths, depths, repeats.
        progress: called with the number of prompt tokens done since the last call.

    Raises:
        EvaluationError: thinking is asked for, and the tokenizer knows none.
    """
    budget = settings.needle_thinking_tokens
    if budget and not tokenizer.has_thinking:
        raise EvaluationError(
            f"evaluation: needle_thinking_tokens is {budget}, and the build's tokenizer knows no "
            "thinking. Set it to 0."
        )
    trials: list[NeedleTrial] = []
    for length in settings.needle_lengths:
        for column, depth in enumerate(settings.needle_depths):
            for repeat in range(settings.needle_repeats):
                seed = needle_seed(length, column, repeat)
                trials.append(_try(model, tokenizer, filler, length, depth, repeat, seed, budget))
                if progress:
                    progress(length)
    thinking = f"at most {budget:,} tokens of thinking" if budget else "thinking off"
    return Needle(
        text_sha256=digest_text(filler),
        method=(
            f"one fact and {DISTRACTORS} distractor in each prompt, {settings.needle_repeats} for "
            f"each length and depth in turning phrasings, chat template with {thinking}, greedy; "
            "the first number of the answer must be the fact's"
        ),
        trials=trials,
        phrasings=[form.question for form in PHRASINGS],
        thinking_tokens=budget,
    )


def _try(
    model: Any,
    tokenizer: Any,
    filler: str,
    length: int,
    depth: float,
    phrasing: int,
    seed: int,
    thinking_tokens: int,
) -> NeedleTrial:
    prompt = build_needle_prompt(
        lambda text: tokenizer.encode(text, add_special_tokens=False),
        filler,
        length_tokens=length,
        depth=depth,
        seed=seed,
        phrasing=phrasing,
        distractors=DISTRACTORS,
    )
    thinks = thinking_tokens > 0
    ids = chat_ids(tokenizer, prompt.messages[0]["content"], thinking=thinks)
    made, _ = greedy(model, tokenizer, ids, thinking_tokens + _REPLY_TOKENS)
    said = tokenizer.decode(made)
    reply = answer_of(said, tokenizer.think_end) if thinks else said
    return NeedleTrial(
        length=length,
        depth=depth,
        prompt_tokens=len(ids),
        phrasing=phrasing % len(PHRASINGS),
        expected=prompt.expected,
        reply=reply,
        retrieved=is_retrieved(reply, prompt.expected),
        reply_tokens=len(made),
    )
