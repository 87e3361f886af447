"""Loops and repeats in token sequences."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glm_quant.evaluation.coherence import (
    LOOP_TOKENS,
    LOOP_TURNS,
    longest_repeat,
    loop_period,
    repeated_share,
)

FRESH = list(range(1000, 1060))
TOKENS = st.lists(st.integers(0, 3), max_size=40)


@pytest.mark.parametrize("period", [1, 3, 7, 20])
def test_a_loop_is_found_with_its_period(period: int) -> None:
    """An output that ends in turns of a span loops, however it began; one turn less does not."""
    turns = max(LOOP_TURNS, -(-LOOP_TOKENS // period))
    span = list(range(period))
    assert loop_period(FRESH + span * turns) == period
    shorter = FRESH + (span * turns)[: max(LOOP_TURNS * period, LOOP_TOKENS) - 1]
    assert loop_period(shorter) is None


def test_a_loop_that_ended_is_no_loop() -> None:
    """What repeats in the middle is counted as repeats."""
    tokens = [1, 2, 3] * 20 + FRESH
    assert loop_period(tokens) is None
    assert longest_repeat(tokens) == 57  # all turns but one stand twice, overlapping
    assert repeated_share(tokens, 8) == pytest.approx(50 / 113)


def test_fresh_output_repeats_nothing() -> None:
    """Sixty different tokens."""
    assert (loop_period(FRESH), longest_repeat(FRESH), repeated_share(FRESH, 8)) == (None, 0, 0)


def test_outputs_too_short_to_count() -> None:
    """Nothing, and less than one n-gram."""
    for tokens in ([], [5], [5, 6, 7]):
        assert (loop_period(tokens), longest_repeat(tokens)) == (None, 0)
        assert repeated_share(tokens, 8) == 0.0


@given(TOKENS)
def test_longest_repeat_is_that_of_the_definition(tokens: list[int]) -> None:
    """The longest length at which two places hold the same span, by trying all."""
    n = len(tokens)
    longest = max(
        (
            length
            for length in range(1, n)
            for i in range(n - length + 1)
            for j in range(i)
            if tokens[i : i + length] == tokens[j : j + length]
        ),
        default=0,
    )
    assert longest_repeat(tokens) == longest
