"""The figures of an evaluation by name, two builds' figures beside each other, and bounds on them.

Names are those that bounds write. Where two builds went through the same windows, prompts or items,
the error of their difference is taken from the differences, pair by pair: it is far below the
errors of the two figures. What a reader would get wrong: figures of unlike measurements (another
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
    found = {_perplexity_name(i, p): p.value for i, p in enumerate(measured.perplexity)}
    if measured.needle:
        found["needle"] = measured.needle.score
    if measured.peer_perplexity:
        found["peer_perplexity"] = measured.peer_perplexity.value
    for task in measured.harness.tasks if measured.harness else ():
        found[f"harness/{task.task}"] = task.score.value
    if measured.coherence:
        found["loops"] = measured.coherence.loops
        found["repeated_share"] = measured.coherence.repeated_share
        found["longest_repeat"] = measured.coherence.longest_repeat
    for speed in measured.speed:
        found[f"prefill/{speed.prompt_tokens}"] = speed.prefill_rate
        found[f"decode/{speed.prompt_tokens}"] = speed.decode_rate
    return found | {
        "load_seconds": measured.load.seconds,
        "peak_rss_gb": measured.peak_rss_bytes / 1e9,
        "mlx_peak_gb": measured.mlx_peak_bytes / 1e9,
    }


def compare(name: str, own: Measurements, other: Measurements) -> list[Comparison]:
    """Return what two builds share, figure by figure.

    Args:
        name: what the recipe calls the other.
        own: this build's measurements.
        other: the baseline's.
    """
    ours, theirs, paired = figures(own), figures(other), _paired(own, other)
    found: list[Comparison] = []
    for measure, value in ours.items():
        pair = paired.get(measure, (None, 0))
        if measure in theirs and pair is not None:
            found.append(
                Comparison(
                    measure=measure,
                    baseline=name,
                    value=value,
                    baseline_value=theirs[measure],
                    difference=value - theirs[measure],
                    standard_error=pair[0],
                    pairs=pair[1],
                )
            )
    return found


def hold(
    bounds: Sequence[Bound],
    found: Mapping[str, float],
    comparisons: Sequence[Comparison],
    stage: str,
) -> None:
    """Hold figures to a recipe's bounds.

    Args:
        bounds: the recipe's.
        found: this build's figures by name.
        comparisons: the figures beside the baselines'.
        stage: for the message.

    Raises:
        EvaluationError: a bound is broken, or has nothing to hold; names the measure and all
            numbers.
    """
    beside = {(each.baseline, each.measure): each for each in comparisons}
    for bound in bounds:
        if bound.baseline is None:
            if bound.measure not in found:
                raise EvaluationError(
                    f"{stage}: the recipe bounds {bound.measure}, which was not measured. There is "
                    f"{', '.join(found)}."
                )
            value, told = found[bound.measure], f"{bound.measure} is {found[bound.measure]:.4g}"
        else:
            value, told = _relative(bound, beside.get((bound.baseline, bound.measure)), stage)
        # `not <=` so that NaN breaks the bound too.
        if bound.max is not None and not value <= bound.max:
            raise EvaluationError(f"{stage}: {told}; the recipe's max is {bound.max:g}. {_WAY_OUT}")
        if bound.min is not None and not value >= bound.min:
            raise EvaluationError(f"{stage}: {told}; the recipe's min is {bound.min:g}. {_WAY_OUT}")


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


def _relative(bound: Bound, found: Comparison | None, stage: str) -> tuple[float, str]:
    if found is None:
        raise EvaluationError(
            f"{stage}: the recipe bounds {bound.measure} beside baseline {bound.baseline!r}, which "
            "has no such figure, or has it of another text, length or data. Name the folder of its "
            "checkpoint as baseline: it is then measured as this build is."
        )
    value, other = found.value, found.baseline_value
    told = f"{bound.measure} is {value:.4g}, that of baseline {bound.baseline!r} {other:.4g}"
    if not bound.ratio:
        return found.difference, f"{told}: {found.difference:+.4g}"
    if other == 0:
        raise EvaluationError(f"{stage}: {told}: there is no ratio to 0. Bound the difference.")
    return value / other, f"{told}: {value / other:.4g} of it"


def _perplexity_name(place: int, perplexity: Perplexity) -> str:
    """Return a text's name in bounds: the first is the recipe's perplexity_text."""
    return "perplexity" if place == 0 else f"perplexity/{perplexity.text}"


def _paired(own: Measurements, other: Measurements) -> dict[str, Paired]:
    """Return errors of differences by figure; None where the figures are of unlike things."""
    found: dict[str, Paired] = {}
    if own.machine != other.machine:
        found |= dict.fromkeys(name for name in figures(own) if _is_of_machine(name))
    theirs = {_perplexity_name(i, p): p for i, p in enumerate(other.perplexity)}
    for i, ours in enumerate(own.perplexity):
        name = _perplexity_name(i, ours)
        if name in theirs:
            found[name] = _pair_perplexity(ours, theirs[name])
    if own.needle and other.needle:
        found["needle"] = _pair_needle(own.needle, other.needle)
    if own.peer_perplexity and other.peer_perplexity:
        found["peer_perplexity"] = _pair_peer(own.peer_perplexity, other.peer_perplexity)
    if own.harness and other.harness:
        tasks = {task.task: task for task in other.harness.tasks}
        same = own.harness.model_copy(update={"tasks": []}) == other.harness.model_copy(
            update={"tasks": []}
        )
        for task in own.harness.tasks:
            if task.task in tasks:
                pair = _pair_task(task, tasks[task.task]) if same else None
                found[f"harness/{task.task}"] = pair
    if own.coherence and other.coherence and own.coherence.method != other.coherence.method:
        found |= dict.fromkeys(("loops", "repeated_share", "longest_repeat"))
    return found


def _is_of_machine(name: str) -> bool:
    return name.endswith(("_seconds", "_gb")) or name.startswith(("prefill/", "decode/"))


def _pair_perplexity(own: Perplexity, other: Perplexity) -> Paired:
    protocol = ("text_sha256", "tokens", "context", "stride", "window_tokens")
    if any(getattr(own, name) != getattr(other, name) for name in protocol):
        return None
    return _pair_losses(own.value, own.window_nll, other.value, other.window_nll, own.window_tokens)


def _pair_peer(own: PeerPerplexity, other: PeerPerplexity) -> Paired:
    protocol = ("dataset", "dataset_sha256", "sequence_length", "samples", "seed")
    if any(getattr(own, name) != getattr(other, name) for name in protocol):
        return None
    ones = [1] * len(own.sequence_nll)
    return _pair_losses(own.value, own.sequence_nll, other.value, other.sequence_nll, ones)


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


def _pair_needle(own: Needle, other: Needle) -> Paired:
    cells = [
        [(trial.length, trial.depth, trial.phrasing, trial.expected) for trial in each.trials]
        for each in (own, other)
    ]
    same_way = own.text_sha256 == other.text_sha256
    if cells[0] != cells[1] or not same_way or own.thinking_tokens != other.thinking_tokens:
        return None
    return _pair_items(
        [float(trial.retrieved) for trial in own.trials],
        [float(trial.retrieved) for trial in other.trials],
    )


def _pair_task(own: HarnessTask, other: HarnessTask) -> Paired:
    protocol = ("version", "dataset", "dataset_sha256", "metric")
    if any(getattr(own, name) != getattr(other, name) for name in protocol):
        return None
    if len(own.items) != len(other.items):
        return None
    return _pair_items(own.items, other.items)


def _pair_items(own: Sequence[float], other: Sequence[float]) -> Paired:
    return paired_difference(own, other, np.ones(len(own)))[1], len(own)
