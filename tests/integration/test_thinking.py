"""The needle with a budget to think in: what counts is what is said after the thinking."""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load

from glm_quant.data import held_out_text, tiny_glm_path
from glm_quant.errors import EvaluationError
from glm_quant.evaluation.needle import measure_needle
from glm_quant.evaluation.records import Needle
from glm_quant.evaluation.replies import answer_of, chat_ids
from glm_quant.recipe import load_recipe
from glm_quant.settings import EvaluationSettings


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory, prepare: Callable[..., Any]) -> Any:
    """Give model and tokenizer of a build of the shipped checkpoint, as stock mlx-lm loads it."""
    recipe = load_recipe("uniform-4bit").model_copy(update={"quantizer": "minmax"})
    made = prepare(tiny_glm_path(), tmp_path_factory.mktemp("build"), recipe)
    made.complete_all()
    made.assemble()
    model, tokenizer = load(str(made.output), trust_remote_code=True)[:2]
    model.set_dtype(mx.float32)
    return model, tokenizer


def needle(loaded: Any, budget: int) -> Needle:
    settings = EvaluationSettings(
        needle_lengths=(128,), needle_repeats=1, needle_thinking_tokens=budget
    )
    return measure_needle(*loaded, held_out_text(), settings)


def test_the_answer_is_what_follows_the_thinking(loaded: Any) -> None:
    """The shipped checkpoint closes `<think>` at once: the same answers, one token later."""
    tokenizer = loaded[1]
    open_end = tokenizer.decode(chat_ids(tokenizer, "?", thinking=True))
    closed = tokenizer.decode(chat_ids(tokenizer, "?", thinking=False))
    assert closed == open_end + tokenizer.think_end
    thought, plain = needle(loaded, 8), needle(loaded, 0)
    assert thought.thinking_tokens == 8
    assert "at most 8 tokens of thinking" in thought.method
    assert plain.score > 0.5
    for with_thinking, without in zip(thought.trials, plain.trials, strict=True):
        assert with_thinking.reply == without.reply
        assert with_thinking.retrieved == without.retrieved
        assert with_thinking.reply_tokens == without.reply_tokens + 1
        assert with_thinking.prompt_tokens == without.prompt_tokens - 1


def test_a_code_in_unfinished_thinking_is_no_answer() -> None:
    assert answer_of("The code is 4719, or is it", "</think>") == ""
    assert answer_of("4711? No.</think>4719", "</think>") == "4719"


class Plain:
    """A tokenizer without thinking."""

    has_thinking = False


def test_thinking_is_refused_where_the_tokenizer_knows_none(loaded: Any) -> None:
    settings = EvaluationSettings(needle_lengths=(128,), needle_thinking_tokens=8)
    with pytest.raises(EvaluationError, match="is 8, and the build's tokenizer knows no thinking"):
        measure_needle(loaded[0], Plain(), held_out_text(), settings)
