"""Figures by name, builds beside each other, and bounds that stop a build."""

import math
from typing import Any

import numpy as np
import pytest

from glm_quant.errors import EvaluationError, RecipeError
from glm_quant.evaluation.figures import compare, figures, hold, paired_difference
from glm_quant.evaluation.peer_records import Harness, HarnessScore, HarnessTask, PeerPerplexity
from glm_quant.evaluation.records import (
    Coherence,
    Load,
    LongOutput,
    Measurements,
    Needle,
    NeedleTrial,
    Perplexity,
    Speed,
)
from glm_quant.recipe import parse_recipe
from glm_quant.settings import Bound
from tests.card_records import EPYC


def perplexity(losses: list[float], text: str = "t", **changed: Any) -> Perplexity:
    mean = sum(losses) / (10 * len(losses))
    given = {
        "text": text,
        "text_sha256": "0" * 64,
        "tokens": 10 * len(losses) + 1,
        "scored_tokens": 10 * len(losses),
        "context": 64,
        "stride": 10,
        "windows": len(losses),
        "mean_nll": mean,
        "value": math.exp(mean),
        "standard_error": None,
        "method": "strided",
        "window_nll": losses,
        "window_tokens": [10] * len(losses),
    }
    return Perplexity(**{**given, **changed})


def needle(hits: list[bool]) -> Needle:
    trials = [
        NeedleTrial(
            length=64,
            depth=0.5,
            prompt_tokens=60,
            phrasing=i % 4,
            expected=f"{i:04d}",
            reply="",
            retrieved=hit,
        )
        for i, hit in enumerate(hits)
    ]
    return Needle(text_sha256="0", method="m", trials=trials)


def harness(items: list[float], **changed: Any) -> Harness:
    score = HarnessScore(metric="acc", value=float(np.mean(items)), standard_error=0.1)
    task = HarnessTask(
        task="piqa",
        version="1.0",
        dataset="baber/piqa",
        dataset_sha256=None,
        metric="acc",
        scores=[score],
        items=items,
    )
    given = {
        "version": "0.4",
        "shots": 0,
        "limit": None,
        "seed": 123,
        "chat_template": True,
        "method": "m",
    }
    return Harness(**{**given, **changed}, tasks=[task])


def measured(losses: list[float], **changed: Any) -> Measurements:
    given: dict[str, Any] = {
        "machine": EPYC,
        "arithmetic": "float32",
        "versions": {},
        "load": Load(seconds=2.0, mlx_bytes=1),
        "perplexity": [perplexity(losses)],
        "speed": [],
        "needle": None,
        "peak_rss_bytes": 3_000_000_000,
        "mlx_peak_bytes": 2_000_000_000,
        "seconds": 1.0,
    }
    return Measurements(**{**given, **changed})


OWN, OTHER = [20.0, 26.0, 31.0, 24.0, 29.0], [19.0, 25.5, 29.5, 23.0, 28.5]


def test_every_figure_has_its_name() -> None:
    """Those that bounds write, with the unit that the name says."""
    output = LongOutput(
        prompt="p",
        tokens=9,
        ended=False,
        repeated_share=0.25,
        longest_repeat=4,
        loop_period=3,
        text="",
    )
    peer = PeerPerplexity(
        dataset="d",
        dataset_sha256=None,
        sequence_length=8,
        samples=2,
        seed=1,
        batch_size=1,
        value=5.0,
        standard_error=0.1,
        sequence_nll=[1.0, 2.0],
        method="m",
    )
    speed = Speed(
        prompt_tokens=512,
        generated_tokens=9,
        prefill_seconds=2.0,
        decode_seconds=4.0,
        mlx_peak_bytes=1,
    )
    everything = measured(
        OWN,
        perplexity=[perplexity(OWN), perplexity(OTHER, "code")],
        needle=needle([True, False]),
        harness=harness([1.0, 0.0, 1.0, 1.0]),
        coherence=Coherence(ngram=8, method="m", outputs=[output]),
        peer_perplexity=peer,
        speed=[speed],
    )
    assert figures(everything) == {
        "perplexity": pytest.approx(math.exp(2.6)),
        "perplexity/code": pytest.approx(math.exp(2.51)),
        "needle": 0.5,
        "peer_perplexity": 5.0,
        "harness/piqa": 0.75,
        "loops": 1,
        "repeated_share": 0.25,
        "longest_repeat": 4,
        "prefill/512": 256.0,
        "decode/512": 2.0,
        "load_seconds": 2.0,
        "peak_rss_gb": 3.0,
        "mlx_peak_gb": 2.0,
    }


def test_error_of_a_difference_covers_the_truth_as_often_as_it_should() -> None:
    """Over many pairs that share most of their noise, ± 1.96 errors hold it in about 95 of 100."""
    rng = np.random.default_rng(3)
    hits, errors = 0, []
    for _ in range(400):
        shared = rng.normal(2.0, 1.0, 50)  # how hard each window is, for both builds
        ours = shared + 0.1 + rng.normal(0, 0.05, 50)
        mean, error = paired_difference(ours * 10, shared * 10, np.full(50, 10))
        assert error is not None
        errors.append(error)
        hits += abs(mean - 0.1) <= 1.96 * error
    assert 0.91 <= hits / 400 <= 0.98  # binomial: 0.95 ± 3 · 0.011
    assert np.mean(errors) == pytest.approx(0.05 / math.sqrt(50), rel=0.05)  # unpaired: 0.2


def test_perplexities_of_the_same_windows_are_paired() -> None:
    """The error is that of the difference by the delta method, here against a bootstrap."""
    (found,) = (c for c in compare("b", measured(OWN), measured(OTHER)) if c.pairs)
    assert (found.measure, found.baseline, found.pairs) == ("perplexity", "b", 5)
    assert found.difference == pytest.approx(math.exp(2.6) - math.exp(2.51))
    rng = np.random.default_rng(0)
    picks = rng.integers(0, 5, (20_000, 5))
    own, other = np.array(OWN)[picks].mean(1) / 10, np.array(OTHER)[picks].mean(1) / 10
    spread = np.std(np.exp(own) - np.exp(other)) * math.sqrt(5 / 4)  # bootstrap divides by n
    assert found.standard_error == pytest.approx(spread, rel=0.1)


def test_items_and_prompts_are_paired() -> None:
    """Two of four prompts turned from hit to miss: -0.5 ± the root of 4/3 · 1/16."""
    own = measured(OWN, needle=needle([True, False, False, True]), harness=harness([1, 0, 0, 1]))
    other = measured(OWN, needle=needle([True] * 4), harness=harness([1, 1, 1, 1]))
    found = {each.measure: each for each in compare("b", own, other)}
    for name in ("needle", "harness/piqa"):
        assert found[name].difference == -0.5
        assert found[name].pairs == 4
        assert found[name].standard_error == pytest.approx(math.sqrt(4 / 3 / 16))


@pytest.mark.parametrize(
    ("changed", "gone"),
    [
        ({"perplexity": [perplexity(OTHER, text_sha256="1" * 64)]}, "perplexity"),
        ({"perplexity": [perplexity(OTHER, context=32)]}, "perplexity"),
        ({"needle": needle([True, False, True])}, "needle"),
        ({"harness": harness([1.0], limit=1)}, "harness/piqa"),
        ({"machine": EPYC.model_copy(update={"cores": 4})}, "load_seconds"),
    ],
)
def test_unlike_measurements_are_not_compared(changed: dict[str, Any], gone: str) -> None:
    """Another text, context, set of prompts, limit or machine is another figure."""
    own = measured(OWN, needle=needle([True, False]), harness=harness([1.0, 0.0]))
    assert gone in {each.measure for each in compare("b", own, own)}
    other = own.model_copy(update=changed)
    assert gone not in {each.measure for each in compare("b", own, other)}


@pytest.mark.parametrize(
    ("bound", "told"),
    [
        (Bound(measure="perplexity", max=10), r"perplexity is 13\.46; the recipe's max is 10"),
        (Bound(measure="peak_rss_gb", max=2.5), r"peak_rss_gb is 3; the recipe's max is 2\.5"),
        (Bound(measure="load_seconds", min=9), r"load_seconds is 2; the recipe's min is 9"),
        (
            Bound(measure="perplexity", max=1.05, baseline="b", ratio=True),
            r"perplexity is 13\.46, that of baseline 'b' 12\.3: 1\.094 of it; .* max is 1\.05",
        ),
        (
            Bound(measure="perplexity", max=0.5, baseline="b"),
            r"perplexity is 13\.46, that of baseline 'b' 12\.3: \+1\.159; .* max is 0\.5",
        ),
    ],
)
def test_a_broken_bound_names_measure_and_all_numbers(bound: Bound, told: str) -> None:
    """Absolute and relative ones; just within is allowed."""
    own, found = measured(OWN), compare("b", measured(OWN), measured(OTHER))
    with pytest.raises(EvaluationError, match=f"evaluation: {told}"):
        hold([bound], figures(own), found, "evaluation")
    eased = bound.model_copy(update={"max": bound.max and 100.0, "min": bound.min and -100.0})
    hold([eased], figures(own), found, "evaluation")


def test_nan_breaks_every_bound() -> None:
    """A figure that is no number is not within anything."""
    for bound in (Bound(measure="x", max=1e9), Bound(measure="x", min=-1e9)):
        with pytest.raises(EvaluationError, match="x is nan"):
            hold([bound], {"x": math.nan}, [], "evaluation")


def test_a_bound_that_has_nothing_to_hold_is_an_error() -> None:
    """It must never pass because nothing was measured, or nothing like it."""
    other = measured(OTHER, perplexity=[perplexity(OTHER, context=32)])
    found = compare("b", measured(OWN), other)
    with pytest.raises(EvaluationError, match=r"beside baseline 'b', which has no such figure"):
        hold([Bound(measure="perplexity", max=1, baseline="b")], {}, found, "evaluation")
    with pytest.raises(EvaluationError, match=r"bounds needle, which was not measured"):
        hold([Bound(measure="needle", min=1)], figures(measured(OWN)), [], "evaluation")


RECIPE = "name: r\ndescription: d\nrules:\n  - {match: a, bits: 4}\n"


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ("evaluation:\n  bounds: [{measure: needle, min: 1}]\n", "'needle', which is not measured"),
        ("evaluation:\n  bounds: [{measure: perplexity}]\n", "needs `min` or `max`"),
        ("evaluation:\n  bounds: [{measure: perplexity, max: 1, ratio: true}]\n", "no `baseline`"),
        (
            "evaluation:\n  bounds: [{measure: perplexity, max: 1, baseline: b}]\n",
            "names 'b' as baseline; `baselines` has none",
        ),
        ("divergence:\n  bounds: [{measure: kl, max: 1}]\n", "'kl', which is not measured"),
        ("evaluation:\n  perplexity_texts: {a/b: c.txt}\n", "'a/b' is no plain name"),
        ("evaluation:\n  harness: {files: {boolq: f}}\n", "files has boolq, tasks has not"),
    ],
)
def test_a_bound_that_cannot_be_held_is_refused_with_the_recipe(lines: str, told: str) -> None:
    """Before anything starts, with the line."""
    with pytest.raises(RecipeError, match=rf"r\.yaml:\d+: .*{told}"):
        parse_recipe(RECIPE + lines, "r.yaml")
