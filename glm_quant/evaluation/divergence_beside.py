"""Two builds' distances from the same source beside each other, sequence by sequence.

Both went through the same tokens, so the error of their difference is taken from the sequences'
differences. What a reader would get wrong: only records with the same reference (the same source,
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
    found: dict[str, float] = {}
    for row in record.rows:
        if row.bucket == "all":
            part = "" if row.slice == "all" else f"/{row.slice}"
            found[f"mean_kl{part}"] = row.mean_kl.value
            found[f"p99_kl{part}"] = row.p99_kl
            found[f"top1_agreement{part}"] = row.top1_agreement.value
            found[f"nll_difference{part}"] = row.nll_difference.value
            found[f"perplexity{part}"] = row.build_perplexity.value
    return found


def compare_divergence(
    name: str, own: tuple[DivergenceRecord, Path], other: tuple[DivergenceRecord, Path]
) -> list[Comparison]:
    """Return what two builds' records share, figure by figure; nothing if of unlike references.

    Args:
        name: what the recipe calls the other.
        own: this build's record, and the folder that its outputs are relative to.
        other: the baseline's.
    """
    if own[0].reference != other[0].reference:
        return []
    ours, theirs = divergence_figures(own[0]), divergence_figures(other[0])
    errors = dict(_errors(own, other))
    return [
        Comparison(
            measure=measure,
            baseline=name,
            value=value,
            baseline_value=theirs[measure],
            difference=value - theirs[measure],
            standard_error=errors.get(measure, (None, 0))[0],
            pairs=errors.get(measure, (None, 0))[1],
        )
        for measure, value in ours.items()
        if measure in theirs
    ]


def _errors(
    own: tuple[DivergenceRecord, Path], other: tuple[DivergenceRecord, Path]
) -> Iterator[tuple[str, tuple[float | None, int]]]:
    """Yield the error of each paired figure's difference, and the sequences it comes from."""
    arrays = [load_arrays(root / record.outputs[0].path) for record, root in (own, other)]
    lengths = arrays[0]["lengths"]
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    for part, inside in _slices(own[0], sequence):
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
