"""Bounds and the arithmetic of evaluation records."""

import math

import pytest

from glm_quant.errors import EvaluationError
from glm_quant.evaluation.evaluate import check_bounds
from glm_quant.evaluation.records import (
    EvaluationRecord,
    Load,
    Measurements,
    Needle,
    NeedleTrial,
    Perplexity,
    Speed,
)
from glm_quant.settings import Bound, EvaluationSettings
from tests.card_records import EPYC


def trial(length: int, depth: float, retrieved: bool) -> NeedleTrial:
    return NeedleTrial(
        length=length,
        depth=depth,
        prompt_tokens=length - 3,
        phrasing=0,
        expected="4719",
        reply="4719" if retrieved else "no",
        retrieved=retrieved,
    )


def a_record(perplexity: float = 4.0, needle: Needle | None = None) -> EvaluationRecord:
    measured = Perplexity(
        text="a text",
        text_sha256="0" * 64,
        tokens=100,
        scored_tokens=99,
        context=64,
        stride=32,
        windows=3,
        mean_nll=math.log(perplexity) if perplexity == perplexity else perplexity,
        value=perplexity,
        standard_error=0.1,
        method="strided",
    )
    return EvaluationRecord(
        fingerprint="f",
        measurements=Measurements(
            machine=EPYC,
            arithmetic="float32",
            versions={"mlx": "1"},
            load=Load(seconds=1.0, mlx_bytes=1),
            perplexity=[measured],
            speed=[],
            needle=needle,
            peak_rss_bytes=1,
            mlx_peak_bytes=1,
            seconds=1.0,
        ),
    )


def bounded(measure: str, **limits: float) -> EvaluationSettings:
    bound = Bound.model_validate({"measure": measure, **limits})
    return EvaluationSettings(needle_lengths=(64,), bounds=(bound,))


def test_perplexity_within_the_bound_passes() -> None:
    """The bound itself is allowed."""
    assert check_bounds(a_record(4.0), bounded("perplexity", max=4.0)) is None


@pytest.mark.parametrize("value", [4.5, float("nan"), float("inf")])
def test_broken_perplexity_bound_names_measure_and_both_numbers(value: float) -> None:
    """NaN breaks a bound too."""
    with pytest.raises(EvaluationError, match=r"perplexity is .*; the recipe's max is 4\."):
        check_bounds(a_record(value), bounded("perplexity", max=4.0))


def test_broken_needle_bound_names_measure_and_both_numbers() -> None:
    """One of two found is 0.5."""
    needle = Needle(
        text_sha256="0", method="m", trials=[trial(64, 0.1, True), trial(64, 0.9, False)]
    )
    with pytest.raises(EvaluationError, match=r"needle is 0\.5; the recipe's min is 0\.75"):
        check_bounds(a_record(needle=needle), bounded("needle", min=0.75))


def test_needle_bound_without_a_measurement_is_an_error() -> None:
    """A bound must never pass because nothing was measured."""
    with pytest.raises(EvaluationError, match="bounds needle, which was not measured"):
        check_bounds(a_record(), bounded("needle", min=0.5))


def test_needle_grid_and_longest_success() -> None:
    """Cells are shares over repeats; the longest success counts template tokens too."""
    trials = [
        trial(64, 0.1, True),
        trial(64, 0.1, False),
        trial(64, 0.9, True),
        trial(256, 0.1, False),
    ]
    needle = Needle(text_sha256="0", method="m", trials=trials)
    assert needle.grid() == {64: {0.1: 0.5, 0.9: 1.0}, 256: {0.1: 0.0}}
    assert needle.score == 0.5
    assert needle.longest_prompt_tokens == 61


@pytest.mark.parametrize(
    ("hits", "tries", "low", "high"),
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (8, 10, 0.4902, 0.9433)],
)
def test_needle_interval_is_wilsons(hits: int, tries: int, low: float, high: float) -> None:
    """Known values of Wilson's 95 % interval: it stays within 0 to 1 where the naive one fails."""
    trials = [trial(64, 0.5, i < hits) for i in range(tries)]
    found = Needle(text_sha256="0", method="m", trials=trials).interval()
    assert found == pytest.approx((low, high), abs=1e-4)


def test_decode_rate_leaves_the_first_token_to_the_prompt() -> None:
    """33 tokens in 4 s after the first are 8 a second."""
    speed = Speed(
        prompt_tokens=128,
        generated_tokens=33,
        prefill_seconds=2.0,
        decode_seconds=4.0,
        mlx_peak_bytes=1,
    )
    assert (speed.prefill_rate, speed.decode_rate) == (64.0, 8.0)


def test_record_survives_its_json() -> None:
    """What is saved is what is read."""
    record = a_record(needle=Needle(text_sha256="0", method="m", trials=[trial(64, 0.1, True)]))
    assert EvaluationRecord.model_validate_json(record.model_dump_json()) == record


def test_records_of_old_are_read() -> None:
    """A record made before the newer measures had fields is one that did not take them."""
    record = a_record(needle=Needle(text_sha256="0", method="m", trials=[trial(64, 0.1, True)]))
    old = record.model_dump(mode="json", exclude_defaults=True)
    assert not {"baselines", "comparisons"} & set(old)
    assert not {"peer_perplexity", "harness", "coherence"} & set(old["measurements"])
    assert EvaluationRecord.model_validate(old) == record
