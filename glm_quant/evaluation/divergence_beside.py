"""Two builds' distances from the same source beside each other, sequence by sequence.

Both went through the same tokens, so the error of their difference is taken from the sequences'
differences. Only records with the same reference (the same source,
tokens and runtime) are compared.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from glm_quant.evaluation.divergence_record import DivergenceRecord, clustered_mean
from glm_quant.evaluation.records import Comparison
from glm_quant.streaming.activations import load_arrays

# What each paired figure is the mean of, in the file of every position's numbers.
_PAIRED = {"mean_kl": "kl", "top1_agreement": "agrees", "nll_difference": "build_nll"}


def divergence_figures(record: DivergenceRecord) -> dict[str, float]:
    """Return every figure that a bound may be on, by its name; a slice's has `/slice`."""
    values: dict[str, float] = {}
    for row in record.rows:
        if row.bucket == "all":
            part = "" if row.slice == "all" else f"/{row.slice}"
            values[f"mean_kl{part}"] = row.mean_kl.value
            values[f"p99_kl{part}"] = row.p99_kl
            values[f"top1_agreement{part}"] = row.top1_agreement.value
            values[f"nll_difference{part}"] = row.nll_difference.value
            values[f"perplexity{part}"] = row.build_perplexity.value
    return values


def compare_divergence(
    name: str, build: tuple[DivergenceRecord, Path], baseline: tuple[DivergenceRecord, Path]
) -> list[Comparison]:
    """Return what two builds' records share, figure by figure; nothing if of unlike references.

    Args:
        name: what the recipe calls the other.
        build: this build's record, and the folder that its outputs are relative to.
        baseline: the baseline's.
    """
    if build[0].reference != baseline[0].reference:
        return []
    build_values, baseline_values = divergence_figures(build[0]), divergence_figures(baseline[0])
    errors = dict(_errors(build, baseline))
    return [
        Comparison(
            measure=measure,
            baseline=name,
            value=value,
            baseline_value=baseline_values[measure],
            difference=value - baseline_values[measure],
            standard_error=errors.get(measure, (None, 0))[0],
            pairs=errors.get(measure, (None, 0))[1],
        )
        for measure, value in build_values.items()
        if measure in baseline_values
    ]


def _errors(
    build: tuple[DivergenceRecord, Path], baseline: tuple[DivergenceRecord, Path]
) -> Iterator[tuple[str, tuple[float | None, int]]]:
    """Yield the error of each paired figure's difference, and the sequences it comes from."""
    arrays = [load_arrays(root / record.outputs[0].path) for record, root in (build, baseline)]
    lengths = arrays[0]["lengths"]
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    for part, inside in _slices(build[0], sequence):
        for figure, column in _PAIRED.items():
            gaps = arrays[0][column].astype(np.float64) - arrays[1][column]
            where = inside & ~np.isnan(gaps)  # a sequence's last token has none after it
            error = clustered_mean(gaps[where], sequence[where]).standard_error
            yield f"{figure}{part}", (error, len(np.unique(sequence[where])))


def _slices(
    record: DivergenceRecord, sequence: NDArray[np.int64]
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield all positions, and those of each slice with its `/name`."""
    yield "", np.ones(len(sequence), np.bool_)
    first = 0
    for part in record.slices:
        last = first + len(part.lengths)
        yield f"/{part.name}", (sequence >= first) & (sequence < last)
        first = last
