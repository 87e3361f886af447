"""What the streamed comparison of a source and a build leaves behind.

Standard errors take whole sequences as the unit, since neighbouring tokens are not independent;
None where there is only one. KL is KL(source ‖ build) in nats over the whole vocabulary.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from glm_quant.artifact import Record
from glm_quant.evaluation.compare import Positions
from glm_quant.evaluation.perplexity import mean_with_error
from glm_quant.evaluation.records import Comparison

Bucket = Literal["all", "below", "above"]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(_Part):
    """A mean over tokens and its standard error."""

    value: float
    standard_error: float | None


class DivergenceRow(_Part):
    """One slice of the token set, at all positions or in one bucket of them.

    Attributes:
        slice: the slice's name, or "all".
        bucket: "below" are positions that see at most index_topk keys, "above" those after them.
        positions: how many distributions were compared.
        mean_kl: the mean of KL.
        top1_agreement: share of positions at which both name the same most likely token.
        scored: positions with a token after them: what the losses are means over.
        reference_nll: the source's mean loss in nats; its perplexity is exp of it.
        build_nll: the build's.
        nll_difference: build less source, token by token: its error is far below the two others'.
    """

    slice: str
    bucket: Bucket
    positions: int
    mean_kl: Estimate
    median_kl: float
    p99_kl: float
    max_kl: float
    top1_agreement: Estimate
    scored: int
    reference_nll: Estimate
    build_nll: Estimate
    nll_difference: Estimate

    @property
    def reference_perplexity(self) -> Estimate:
        """The source's perplexity."""
        return _exp(self.reference_nll)

    @property
    def build_perplexity(self) -> Estimate:
        """The build's perplexity."""
        return _exp(self.build_nll)


class SliceFacts(_Part):
    """A slice of the token set.

    Attributes:
        text_sha256: of the text that its tokens were cut from.
        lengths: tokens of each sequence.
    """

    name: str
    text_sha256: str
    lengths: list[int]


class PassFacts(_Part):
    """How one model's pass over all layers went.

    Attributes:
        seconds: wall time of this process, without what an interrupted one had done.
        weight_bytes: tensors of the model, all of which are read at most once a wave.
        planned_bytes: memory that was computed beforehand.
        waves: parts in which the tokens went through a layer.
        mlx_peak_bytes: what MLX allocated at most; numpy's copies of the states come on top.
    """

    seconds: float
    weight_bytes: int
    planned_bytes: int
    waves: int
    mlx_peak_bytes: int


class ReferenceRecord(Record):
    """The source's final hidden states for a token set: made once, used by every build.

    Attributes:
        source: where the source was.
        tokens_sha256: of all token ids.
        versions: of the packages that computed it.
        device: "cpu" or "gpu".
    """

    source: str
    tokens_sha256: str
    versions: dict[str, str]
    device: str
    done: PassFacts


class DivergenceRecord(Record):
    """How far a build is from its source. The output is every position's numbers.

    Attributes:
        reference: fingerprint of the reference record.
        build: identity of the build: its manifest's sha256, or that of its files' identities.
        arithmetic: what both models were computed in.
        index_topk: where the buckets meet.
        comparisons: KL, agreement and loss beside those of the recipe's baselines, sequence by
            sequence.
    """

    reference: str
    source: str
    build: str
    arithmetic: str = "float32, each weight expanded to the value that it stands for"
    index_topk: int
    slices: list[SliceFacts]
    rows: list[DivergenceRow]
    reference_pass: PassFacts
    build_pass: PassFacts
    compare_seconds: float
    versions: dict[str, str]
    comparisons: tuple[Comparison, ...] = ()

    def row(self, name: str = "all", bucket: Bucket = "all") -> DivergenceRow:
        """Return the row of a slice and bucket."""
        return next(row for row in self.rows if (row.slice, row.bucket) == (name, bucket))


def make_rows(
    names: Sequence[str], lengths: Sequence[int], positions: Positions, index_topk: int
) -> list[DivergenceRow]:
    """Return the rows of all slices and buckets that have positions.

    Args:
        names: the slice of each sequence.
        lengths: tokens of each sequence.
        positions: of all sequences, one after the other.
        index_topk: position i sees i + 1 keys.
    """
    sequence = np.repeat(np.arange(len(lengths)), lengths)
    place = np.concatenate([np.arange(length) for length in lengths])
    slice_of = np.repeat(np.array(names), lengths)
    rows: list[DivergenceRow] = []
    for name in dict.fromkeys(["all", *names]):
        inside = slice_of == name if name != "all" else np.ones(len(place), np.bool_)
        above = inside & (place >= index_topk)
        rows.append(_row(name, "all", inside, sequence, positions))
        if above.any():
            rows.append(_row(name, "below", inside & ~above, sequence, positions))
            rows.append(_row(name, "above", above, sequence, positions))
    return rows


def _row(
    name: str,
    bucket: Bucket,
    where: NDArray[np.bool_],
    sequence: NDArray[np.int64],
    positions: Positions,
) -> DivergenceRow:
    kl = positions.kl[where]
    scored = where & ~np.isnan(positions.reference_nll)
    source, build = positions.reference_nll, positions.build_nll

    def mean(values: NDArray[np.float64], at: NDArray[np.bool_]) -> Estimate:
        return clustered_mean(values[at], sequence[at])

    return DivergenceRow(
        slice=name,
        bucket=bucket,
        positions=int(where.sum()),
        mean_kl=mean(positions.kl, where),
        median_kl=float(np.median(kl)),
        p99_kl=float(np.quantile(kl, 0.99)),
        max_kl=float(kl.max()),
        top1_agreement=mean(positions.agrees.astype(np.float64), where),
        scored=int(scored.sum()),
        reference_nll=mean(source, scored),
        build_nll=mean(build, scored),
        nll_difference=mean(build - source, scored),
    )


def clustered_mean(values: NDArray[np.float64], clusters: NDArray[np.int64]) -> Estimate:
    """Return the mean of some values and its error from the scatter between clusters."""
    _, first, counts = np.unique(clusters, return_index=True, return_counts=True)
    sums = np.add.reduceat(values, first) if len(values) else np.zeros(0)
    parts = [(float(total), int(count)) for total, count in zip(sums, counts, strict=True)]
    value, error = mean_with_error(parts) if parts else (float("nan"), None)
    return Estimate(value=value, standard_error=error)


def _exp(nll: Estimate) -> Estimate:
    value = float(np.exp(nll.value))
    error = None if nll.standard_error is None else value * nll.standard_error
    return Estimate(value=value, standard_error=error)
