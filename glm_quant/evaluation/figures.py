"""The figures of an evaluation by name, two builds' figures beside each other, and bounds on them.

Names are those that bounds write. Where two builds went through the same windows, prompts or items,
the error of their difference is taken from the differences, pair by pair: it is far below the
errors of the two figures. Figures of unlike measurements (another
text, another length) share a name and are not compared.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike

from glm_quant.errors import EvaluationError
from glm_quant.evaluation.peer_records import HarnessTask, PeerPerplexity
from glm_quant.evaluation.records import Comparison, Measurements, Needle, Perplexity
from glm_quant.settings import Bound

# The error of a difference, and the pairs that it comes from; None where there are no pairs.
Paired = tuple[float | None, int] | None


def figures(measured: Measurements) -> dict[str, float]:
    """Return every figure that a bound may be on, by its name."""
    values = {_perplexity_name(i, p): p.value for i, p in enumerate(measured.perplexity)}
    if measured.needle:
        values["needle"] = measured.needle.score
    if measured.peer_perplexity:
        values["peer_perplexity"] = measured.peer_perplexity.value
    for task in measured.harness.tasks if measured.harness else ():
        values[f"harness/{task.task}"] = task.score.value
    if measured.coherence:
        values["loops"] = measured.coherence.loops
        values["repeated_share"] = measured.coherence.repeated_share
        values["longest_repeat"] = measured.coherence.longest_repeat
    for speed in measured.speed:
        values[f"prefill/{speed.prompt_tokens}"] = speed.prefill_rate
        values[f"decode/{speed.prompt_tokens}"] = speed.decode_rate
    return values | {
        "load_seconds": measured.load.seconds,
        "peak_rss_gb": measured.peak_rss_bytes / 1e9,
        "mlx_peak_gb": measured.mlx_peak_bytes / 1e9,
    }


def compare(name: str, build: Measurements, baseline: Measurements) -> list[Comparison]:
    """Return what two builds share, figure by figure.

    Args:
        name: what the recipe calls the other.
        build: this build's measurements.
        baseline: the baseline's.
    """
    build_values, baseline_values, paired = (
        figures(build),
        figures(baseline),
        _paired(build, baseline),
    )
    comparisons: list[Comparison] = []
    for measure, value in build_values.items():
        pair = paired.get(measure, (None, 0))
        if measure in baseline_values and pair is not None:
            comparisons.append(
                Comparison(
                    measure=measure,
                    baseline=name,
                    value=value,
                    baseline_value=baseline_values[measure],
                    difference=value - baseline_values[measure],
                    standard_error=pair[0],
                    pairs=pair[1],
                )
            )
    return comparisons


def hold(
    bounds: Sequence[Bound],
    values: Mapping[str, float],
    comparisons: Sequence[Comparison],
    stage: str,
) -> None:
    """Hold figures to a recipe's bounds.

    Args:
        bounds: the recipe's.
        values: this build's figures by name.
        comparisons: the figures beside the baselines'.
        stage: for the message.

    Raises:
        EvaluationError: a bound is broken, or has nothing to hold; names the measure and all
            numbers.
    """
    beside = {(each.baseline, each.measure): each for each in comparisons}
    for bound in bounds:
        if bound.baseline is None:
            if bound.measure not in values:
                raise EvaluationError(
                    f"{stage}: the recipe bounds {bound.measure}, which was not measured. There is "
                    f"{', '.join(values)}."
                )
            value, statement = (
                values[bound.measure],
                f"{bound.measure} is {values[bound.measure]:.4g}",
            )
        else:
            value, statement = _relative(bound, beside.get((bound.baseline, bound.measure)), stage)
        # `not <=` so that NaN breaks the bound too.
        if bound.max is not None and not value <= bound.max:
            raise EvaluationError(
                f"{stage}: {statement}; the recipe's max is {bound.max:g}. {_WAY_OUT}"
            )
        if bound.min is not None and not value >= bound.min:
            raise EvaluationError(
                f"{stage}: {statement}; the recipe's min is {bound.min:g}. {_WAY_OUT}"
            )


_WAY_OUT = "Give the recipe more bits, or correct the bound."


def paired_difference(
    sums: ArrayLike, other_sums: ArrayLike, counts: ArrayLike
) -> tuple[float, float | None]:
    """Return the difference of two means over the same clusters, and its standard error.

    Args:
        sums: of one build's values in each cluster, [clusters].
        other_sums: of the other's, [clusters].
        counts: values in each cluster, [clusters].
    """
    gaps = np.asarray(sums, np.float64) - np.asarray(other_sums, np.float64)
    weights = np.asarray(counts, np.float64)
    k, total = len(gaps), float(weights.sum())
    mean = float(gaps.sum()) / total
    if k < 2:
        return mean, None
    scatter = float(((gaps - mean * weights) ** 2).sum())
    return mean, math.sqrt(k / (k - 1) * scatter) / total  # as perplexity.mean_with_error


def _relative(bound: Bound, comparison: Comparison | None, stage: str) -> tuple[float, str]:
    if comparison is None:
        raise EvaluationError(
            f"{stage}: the recipe bounds {bound.measure} beside baseline {bound.baseline!r}, which "
            "has no such figure, or has it of another text, length or data. Name the folder of its "
            "checkpoint as baseline: it is then measured as this build is."
        )
    value, baseline_value = comparison.value, comparison.baseline_value
    statement = (
        f"{bound.measure} is {value:.4g}, that of baseline {bound.baseline!r} {baseline_value:.4g}"
    )
    if not bound.ratio:
        return comparison.difference, f"{statement}: {comparison.difference:+.4g}"
    if baseline_value == 0:
        raise EvaluationError(
            f"{stage}: {statement}: there is no ratio to 0. Bound the difference."
        )
    return value / baseline_value, f"{statement}: {value / baseline_value:.4g} of it"


def _perplexity_name(place: int, perplexity: Perplexity) -> str:
    """Return a text's name in bounds: the first is the recipe's perplexity_text."""
    return "perplexity" if place == 0 else f"perplexity/{perplexity.text}"


def _paired(build: Measurements, baseline: Measurements) -> dict[str, Paired]:
    """Return errors of differences by figure; None where the figures are of unlike things."""
    pairs: dict[str, Paired] = {}
    if build.machine != baseline.machine:
        pairs |= dict.fromkeys(name for name in figures(build) if _is_of_machine(name))
    baseline_texts = {_perplexity_name(i, p): p for i, p in enumerate(baseline.perplexity)}
    for i, text in enumerate(build.perplexity):
        name = _perplexity_name(i, text)
        if name in baseline_texts:
            pairs[name] = _pair_perplexity(text, baseline_texts[name])
    if build.needle and baseline.needle:
        pairs["needle"] = _pair_needle(build.needle, baseline.needle)
    if build.peer_perplexity and baseline.peer_perplexity:
        pairs["peer_perplexity"] = _pair_peer(build.peer_perplexity, baseline.peer_perplexity)
    if build.harness and baseline.harness:
        tasks = {task.task: task for task in baseline.harness.tasks}
        same = build.harness.model_copy(update={"tasks": []}) == baseline.harness.model_copy(
            update={"tasks": []}
        )
        for task in build.harness.tasks:
            if task.task in tasks:
                pair = _pair_task(task, tasks[task.task]) if same else None
                pairs[f"harness/{task.task}"] = pair
    if (
        build.coherence
        and baseline.coherence
        and build.coherence.method != baseline.coherence.method
    ):
        pairs |= dict.fromkeys(("loops", "repeated_share", "longest_repeat"))
    return pairs


def _is_of_machine(name: str) -> bool:
    return name.endswith(("_seconds", "_gb")) or name.startswith(("prefill/", "decode/"))


def _pair_perplexity(build: Perplexity, baseline: Perplexity) -> Paired:
    protocol = ("text_sha256", "tokens", "context", "stride", "window_tokens")
    if any(getattr(build, name) != getattr(baseline, name) for name in protocol):
        return None
    return _pair_losses(
        build.value, build.window_nll, baseline.value, baseline.window_nll, build.window_tokens
    )


def _pair_peer(build: PeerPerplexity, baseline: PeerPerplexity) -> Paired:
    protocol = ("dataset", "dataset_sha256", "sequence_length", "samples", "seed")
    if any(getattr(build, name) != getattr(baseline, name) for name in protocol):
        return None
    ones = [1] * len(build.sequence_nll)
    return _pair_losses(
        build.value, build.sequence_nll, baseline.value, baseline.sequence_nll, ones
    )


def _pair_losses(
    value: float,
    losses: Sequence[float],
    other_value: float,
    other_losses: Sequence[float],
    counts: Sequence[int],
) -> Paired:
    """Return the error of a difference of perplexities: each exp is followed by its slope."""
    if len(losses) < 2:
        return None, 0
    slope = (value * np.array(losses), other_value * np.array(other_losses))
    # Deviations from each mean: only the difference of perplexities itself must not count.
    weights = np.array(counts, np.float64)
    centred = [part - part.sum() / weights.sum() * weights for part in slope]
    return paired_difference(centred[0], centred[1], weights)[1], len(losses)


def _pair_needle(build: Needle, baseline: Needle) -> Paired:
    cells = [
        [(trial.length, trial.depth, trial.phrasing, trial.expected) for trial in each.trials]
        for each in (build, baseline)
    ]
    same_way = build.text_sha256 == baseline.text_sha256
    if cells[0] != cells[1] or not same_way or build.thinking_tokens != baseline.thinking_tokens:
        return None
    return _pair_items(
        [float(trial.retrieved) for trial in build.trials],
        [float(trial.retrieved) for trial in baseline.trials],
    )


def _pair_task(build: HarnessTask, baseline: HarnessTask) -> Paired:
    protocol = ("version", "dataset", "dataset_sha256", "metric")
    if any(getattr(build, name) != getattr(baseline, name) for name in protocol):
        return None
    if len(build.items) != len(baseline.items):
        return None
    return _pair_items(build.items, baseline.items)


def _pair_items(build: Sequence[float], baseline: Sequence[float]) -> Paired:
    return paired_difference(build, baseline, np.ones(len(build)))[1], len(build)
