"""What it costs in quality to store one part in one way, all else being the source's.

Three measures. `kl` streams the source with just this part quantized and takes the mean of KL over
some tokens: what a user would notice, but the whole source is read for every number. `error` reads
a few rows of each weight and sums their relative squared errors, weighed by the energies of their
inputs where there is an imatrix: Σ over matrices of ΣE(w - ŵ)² / ΣEw². It takes each matrix to
matter as much as any other, which no model obeys. `scaled` streams once for each part, in one
scheme, and scales that KL by the ratio of errors for the others. What a reader would get wrong:
costs are added up over parts as if they did not meet, which holds for small errors (HIGGS,
arXiv:2411.17525).

Each number is a record, keyed by content: a fit that was interrupted, or that has another budget,
measures only what is new.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, Protocol, get_args

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.artifact import Record
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import WeightError
from glm_quant.evaluation.activations import load_arrays
from glm_quant.evaluation.compare import compare_states, targets_of
from glm_quant.evaluation.divergence import half_of_memory, reference_key
from glm_quant.evaluation.memory_plan import plan_memory
from glm_quant.evaluation.streaming import forget_states, sequence_path, stream_states
from glm_quant.evaluation.token_set import TokenSet
from glm_quant.evaluation.weights import Floats, SourceWeights
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.fit.parts import Part
from glm_quant.fit.trial import TrialWeights, expanded
from glm_quant.model.geometry import Geometry
from glm_quant.model.restructure import transform_rows
from glm_quant.quantize import encode
from glm_quant.quantize.plan import PlannedWeight
from glm_quant.quantize.scheme import Quantized

Measure = Literal["kl", "scaled", "error"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Progress = Callable[[int, int], None]

# Raise it when a cost changes its meaning.
VERSION = 1

# Of a weight, so many of its source tensors are looked at, and so many units (rows, heads) of each.
_TENSORS, _UNITS = 8, 16

_log = logging.getLogger(__name__)


class CostRecord(Record):
    """The cost of one part under one scheme."""

    part: str
    scheme: str
    measure: Measure
    cost: float


class Meter(Protocol):
    """One way to measure."""

    measure: Measure

    def inputs(self) -> Canonical:
        """Return what decides its numbers, besides the weights' schemes."""
        ...

    def costs(self, part: Part, schemes: Sequence[Quantized]) -> list[float]:
        """Measure a part under some schemes."""
        ...

    def describe(self) -> str:
        """Return what a cost is, in words."""
        ...


def measure_costs(
    meter: Meter, parts: Sequence[Part], folder: Path, progress: Progress
) -> list[list[float]]:
    """Measure every part under every scheme that it may get, or read what was measured.

    Args:
        meter: how.
        parts: what.
        folder: for the records, ours alone.
        progress: called with numbers that are known and numbers that are needed.

    Returns:
        Costs, a list for each part, in the order of its schemes.
    """
    total = sum(len(part.schemes) for part in parts)
    done = 0
    costs: list[list[float]] = []
    for part in parts:
        found: list[float] = []
        for scheme in part.schemes:
            found.append(_cost(meter, part, scheme, folder))
            done += 1
            progress(done, total)
        costs.append(found)
    return costs


def _cost(meter: Meter, part: Part, scheme: Quantized, folder: Path) -> float:
    key = fingerprint(
        {
            "version": [VERSION, encode.VERSION],
            "measure": meter.measure,
            "inputs": meter.inputs(),
            "weights": {path: one.describe() for path, one in part.under(scheme).items()},
        }
    )
    path = folder / f"cost-{key[:24]}.json"
    known = CostRecord.load(path)
    if known is not None and known.fingerprint == key:
        return known.cost
    cost = meter.costs(part, [scheme])[0]
    _log.info("fit: %s in %s costs %.3g", part.title, scheme.describe(), cost)
    CostRecord(
        fingerprint=key,
        part=part.title,
        scheme=scheme.describe(),
        measure=meter.measure,
        cost=cost,
    ).save(path)
    return cost


class DivergenceMeter:
    """KL of the source with one part quantized, streamed."""

    measure: Measure = "kl"

    def __init__(self, source: Checkpoint, tokens: TokenSet, folder: Path) -> None:
        """Prepare.

        Args:
            source: with its weights.
            tokens: what is streamed.
            folder: for hidden states, ours alone.
        """
        self._source = SourceWeights(source)
        self._tokens = tokens
        self._key = reference_key(source, tokens.sha256)
        self._folder = folder
        self._plan = plan_memory(
            Geometry.from_config(source.config),
            [len(sequence) for sequence in tokens.sequences],
            half_of_memory(),
            self._source.runtime.BLOCK_ELEMENTS,
        )
        self._targets = targets_of(tokens.sequences)
        self._reference: Floats | None = None

    def inputs(self) -> Canonical:
        """Return the key of the source's states."""
        return self._key

    def describe(self) -> str:
        """Return what a cost is."""
        return (
            f"mean KL in nats to the source on {len(self._targets):,} tokens "
            f"(sha256 {self._tokens.sha256[:12]}) with one part quantized"
        )

    def costs(self, part: Part, schemes: Sequence[Quantized]) -> list[float]:
        """Stream the source once for each scheme."""
        return [self.divergence(part.under(scheme)) for scheme in schemes]

    def divergence(self, planned: dict[str, PlannedWeight]) -> float:
        """Return the mean KL of the source with some weights quantized."""
        if self._reference is None:
            self._reference = self._states(self._source, f"reference-{self._key[:16]}")
        schemes: Canonical = {path: one.describe() for path, one in planned.items()}
        trial = TrialWeights(self._source.checkpoint, planned)
        name = f"trial-{fingerprint([self._key, schemes])[:16]}"
        states = self._states(trial, name)
        found = compare_states((self._source, self._reference), (trial, states), self._targets)
        shutil.rmtree(self._folder / name)
        return float(found.kl.mean())

    def _states(self, weights: SourceWeights, name: str) -> Floats:
        """Return final hidden states [tokens, hidden_size], streamed if they do not stand."""
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        sequences = self._tokens.sequences
        paths = [sequence_path(folder, number) for number in range(len(sequences))]
        if not all(path.is_file() for path in paths):
            stream_states(weights, sequences, self._plan, folder)
            forget_states(folder)
        return np.concatenate([load_arrays(path)["hidden"] for path in paths])


class ScaledMeter:
    """KL of one scheme of a part, scaled by the errors of the others."""

    measure: Measure = "scaled"

    def __init__(self, divergence: DivergenceMeter, error: "ErrorMeter") -> None:
        """Prepare; reads nothing yet."""
        self._divergence, self._error = divergence, error
        # Of the part that is being measured: KL for each unit of error.
        self._rate: tuple[Part | None, float] = (None, 0.0)

    def inputs(self) -> Canonical:
        """Return what decides the KL; the weights' identity is in it."""
        return self._divergence.inputs()

    def describe(self) -> str:
        """Return what a cost is."""
        return f"{self._divergence.describe()}, in one scheme; others by the error of some rows"

    def costs(self, part: Part, schemes: Sequence[Quantized]) -> list[float]:
        """Stream the source once for a part, if it is another than before."""
        if self._rate[0] is not part:
            middle = part.schemes[len(part.schemes) // 2]
            (kl,), (error,) = (m.costs(part, [middle]) for m in (self._divergence, self._error))
            self._rate = part, kl / error if error else 0.0
        return [self._rate[1] * error for error in self._error.costs(part, schemes)]


class ErrorMeter:
    """Relative weighted squared error of a few rows of every weight."""

    measure: Measure = "error"

    def __init__(self, source: Checkpoint) -> None:
        """Prepare; reads nothing yet."""
        self._source = source
        self._geometry = Geometry.from_config(source.config)
        # The rows of one part: its schemes are measured one after the other.
        self._held: tuple[Part | None, list[_Sample]] = (None, [])

    def inputs(self) -> Canonical:
        """Return the identity of the source's shards."""
        return {name: self._source.files[name].identity for name in self._source.index.shards}

    def describe(self) -> str:
        """Return what a cost is."""
        return "sum over a part's matrices of the relative squared error of some rows"

    def costs(self, part: Part, schemes: Sequence[Quantized]) -> list[float]:
        """Encode the rows under each scheme."""
        if self._held[0] is not part:
            self._held = part, [s for one in part.weights for s in self._samples(one)]
        return [self._sum(part, scheme) for scheme in schemes]

    def _sum(self, part: Part, scheme: Quantized) -> float:
        planned = part.under(scheme)
        off, size = dict.fromkeys(planned, 0.0), dict.fromkeys(planned, 0.0)
        for path, first_row, rows in self._held[1]:
            one = planned[path]
            energy = np.ones((1, rows.shape[1]), np.float32)
            if one.energy is not None:
                energy = one.energy.of_rows(first_row, len(rows), one.weight.rows)
            weighed = np.repeat(energy, len(rows) // len(energy), axis=0).astype(np.float64)
            made = expanded(one, rows, first_row)
            off[path] += float((weighed * np.square(made - rows, dtype=np.float64)).sum())
            size[path] += float((weighed * np.square(rows, dtype=np.float64)).sum())
        return sum(off[path] / size[path] for path in planned if size[path])

    def _samples(self, planned: PlannedWeight) -> list["_Sample"]:
        parts = planned.weight.parts
        numbers = np.unique(np.linspace(0, len(parts) - 1, min(_TENSORS, len(parts))).astype(int))
        samples: list[_Sample] = []
        for part in (parts[int(number)] for number in numbers):
            rows_in, rows_out = part.unit
            count = min(_UNITS, part.units)
            first = (part.units - count) // 2
            info = self._source.tensors[part.source].rows(first * rows_in, count * rows_in)
            block = np.array(self._source.read_at(info).astype(mx.float32))
            if not np.isfinite(block).all():
                raise WeightError(
                    f"{info.shard}: tensor {part.source} holds NaN or Inf. Fetch the shard again."
                )
            made = transform_rows(block, part.transform, self._geometry)
            samples.append((planned.weight.path, part.first_row + first * rows_out, made))
        return samples


# Path of a weight, row of it at which the sample begins, and its rows.
_Sample = tuple[str, int, NDArray[np.float32]]
