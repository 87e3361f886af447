"""What it costs in quality to store one part in one way, all else being the source's.

Two measures. `kl` streams the source with just this part quantized and takes the mean of KL over
some tokens: what a user would notice, but every part is encoded in every scheme. `scaled` streams
each part in one scheme, and scales that KL for the others by the ratio of errors of a few rows of
each weight, weighed by the importance of their inputs where there is an imatrix: Σ over matrices of
ΣE(w - ŵ)² / ΣEw². Trials walk through the source together, as many as memory holds, so that it is
read once for all of them. Costs
are added up over parts as if they did not meet, which holds for small errors (HIGGS,
arXiv:2411.17525).

Each number is a record, keyed by content: a fit that was interrupted, or that has another budget,
measures only what is new.
"""

import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from glm_quant.artifact import Record, require_space
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes import encode
from glm_quant.codes.affine import to_float32
from glm_quant.codes.scheme import Quantized
from glm_quant.evaluation.compare import compare_states, targets_of
from glm_quant.evaluation.divergence import reference_key
from glm_quant.evaluation.token_set import TokenSet
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.fit.parts import Part
from glm_quant.fit.trial import TrialWeights, expanded
from glm_quant.fit.trial_progress import TrialProgress
from glm_quant.memory import half_of_memory
from glm_quant.model.geometry import Geometry
from glm_quant.quantize.layout import PlannedWeight
from glm_quant.quantize.load import load_parts, read_of
from glm_quant.streaming.activations import load_arrays
from glm_quant.streaming.forward import TokenBatch, forget_states, sequence_path, stream_batches
from glm_quant.streaming.memory_plan import disk_bytes, plan_memory
from glm_quant.streaming.weights import Floats, SourceWeights

Measure = Literal["kl", "scaled"]
MEASURES: tuple[Measure, ...] = get_args(Measure)
Progress = Callable[[int, int], None]

# Raise it when a cost changes its meaning.
VERSION = 1

# Of a weight, so many of its source tensors are looked at, and so many units (rows, heads) of each.
_TENSORS, _UNITS = 8, 16

_log = logging.getLogger(__name__)


class Trial(NamedTuple):
    """One part in one scheme."""

    part: Part
    scheme: Quantized

    @property
    def schemes(self) -> Canonical:
        """What becomes of each weight."""
        return {path: one.describe() for path, one in self.planned.items()}

    @property
    def planned(self) -> dict[str, PlannedWeight]:
        """Its weights by path."""
        return self.part.under(self.scheme)


class CostRecord(Record):
    """The cost of one part under one scheme."""

    part: str
    scheme: str
    measure: str
    cost: float


class Meter(Protocol):
    """One way to measure; its name is part of the key of what it measured."""

    measure: str

    def inputs(self) -> Canonical:
        """Return what decides its numbers, besides the weights' schemes."""
        ...

    def costs(self, trials: Sequence[Trial], progress: Progress) -> Iterator[float]:
        """Measure trials, in their order."""
        ...


def measure_costs(
    meter: "DivergenceMeter | ScaledMeter", parts: Sequence[Part], folder: Path, progress: Progress
) -> list[list[float]]:
    """Measure every part under every scheme that it may get, or read what was measured.

    Args:
        meter: how.
        parts: what.
        folder: for the records, ours alone.
        progress: called with what is done and what there is to do.

    Returns:
        Costs, a list for each part, in the order of its schemes.
    """
    trials = [Trial(part, scheme) for part in parts for scheme in part.schemes]
    if isinstance(meter, ScaledMeter):
        found = meter.scaled(trials, folder, progress)
    else:
        found = recorded(meter, trials, folder, progress)
    costs = iter(found)
    return [[next(costs) for _ in part.schemes] for part in parts]


def recorded(
    meter: Meter, trials: Sequence[Trial], folder: Path, progress: Progress
) -> list[float]:
    """Return the costs of trials; only those without a record are measured."""
    keys = [
        fingerprint(
            {
                "version": [VERSION, encode.VERSION],
                "measure": meter.measure,
                "inputs": meter.inputs(),
                "weights": trial.schemes,
            }
        )
        for trial in trials
    ]
    paths = [folder / f"cost-{key[:24]}.json" for key in keys]
    costs: dict[str, float] = {}
    for key, path in zip(keys, paths, strict=True):
        known = CostRecord.load(path)
        if known is not None and known.fingerprint == key:
            costs[key] = known.cost
    new = [i for i, key in enumerate(keys) if key not in costs]
    found = meter.costs([trials[i] for i in new], progress)
    for i, cost in zip(new, found, strict=True):
        part, scheme = trials[i]
        _log.info("fit: %s in %s costs %.3g", part.title, scheme.describe(), cost)
        costs[keys[i]] = cost
        CostRecord(
            fingerprint=keys[i],
            part=part.title,
            scheme=scheme.describe(),
            measure=meter.measure,
            cost=cost,
        ).save(paths[i])
    return [costs[key] for key in keys]


class DivergenceMeter:
    """KL of the source with one part quantized, streamed."""

    measure = "kl"

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
        self._geometry = Geometry.from_config(source.config)
        self._plan = plan_memory(
            self._geometry,
            [len(sequence) for sequence in tokens.sequences],
            half_of_memory(),
            self._source.runtime.BLOCK_ELEMENTS,
        )
        self._targets = targets_of(tokens.sequences)

    def inputs(self) -> Canonical:
        """Return the key of the source's states."""
        return self._key

    def describe(self) -> str:
        """Return what a cost is."""
        return (
            f"mean KL in nats to the source on {len(self._targets):,} tokens "
            f"(sha256 {self._tokens.sha256[:12]}) with one part quantized"
        )

    def costs(self, trials: Sequence[Trial], progress: Progress) -> Iterator[float]:
        """Stream the source once for as many trials as memory holds, and once more for the rest."""
        count = self._at_once()
        for first in range(0, len(trials), count):
            some = trials[first : first + count]

            def tick(done: int, total: int, first: int = first, some: int = len(some)) -> None:
                progress(first * total + some * done, len(trials) * total)

            yield from self._together(some, tick)

    def _at_once(self) -> int:
        """Return how many trials one pass can take: each has its states, and its own layer."""
        tokens = len(self._targets)
        room = half_of_memory() - 2 * self._plan.fixed_bytes
        return max(room // (self._plan.token_bytes * tokens) - 1, 1)

    def _together(self, trials: Sequence[Trial], progress: Progress) -> list[float]:
        planned = [trial.planned for trial in trials]
        steps = TrialProgress(
            [one for each in planned for one in each.values()],
            self._geometry.num_hidden_layers,
            progress,
        )
        weights = [TrialWeights(self._source.checkpoint, each, steps.encoded) for each in planned]
        names = [f"trial-{fingerprint([self._key, trial.schemes])[:16]}" for trial in trials]
        reference = self._batch(f"reference-{self._key[:16]}", None)
        batches = [self._batch(*one) for one in zip(names, weights, strict=True)]
        missing = [one for one in (reference, *batches) if not _is_done(one)]
        if missing:
            size = disk_bytes(self._geometry, len(self._targets)) * len(missing)
            require_space(self._folder, size, "the hidden states of a pass")
            stream_batches(self._source, missing, steps.passed)
        for one in missing:
            forget_states(one.folder)
        states = _final_states(reference)
        costs: list[float] = []
        for one, model in zip(batches, weights, strict=True):
            own = _final_states(one)
            found = compare_states((self._source, states), (model, own), self._targets)
            costs.append(float(found.kl.mean()))
            steps.compared(len(costs), len(trials))
        for one in batches:
            shutil.rmtree(one.folder)
        return costs

    def _batch(self, name: str, weights: TrialWeights | None) -> TokenBatch:
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        return TokenBatch(self._tokens.sequences, self._plan, folder, variant=weights)


def _final_files(batch: TokenBatch) -> list[Path]:
    return [sequence_path(batch.folder, number) for number in range(len(batch.sequences))]


def _is_done(batch: TokenBatch) -> bool:
    return all(path.is_file() for path in _final_files(batch))


def _final_states(batch: TokenBatch) -> Floats:
    """Return [tokens, hidden_size]."""
    return np.concatenate([load_arrays(path)["hidden"] for path in _final_files(batch)])


class ScaledMeter:
    """KL of one scheme of a part, scaled by the errors of the others."""

    def __init__(self, divergence: DivergenceMeter, error: "ErrorMeter") -> None:
        """Prepare; reads nothing yet."""
        self._divergence, self._error = divergence, error

    def describe(self) -> str:
        """Return what a cost is."""
        return f"{self._divergence.describe()}, in one scheme; others by the error of some rows"

    def scaled(self, trials: Sequence[Trial], folder: Path, progress: Progress) -> list[float]:
        """Return the costs of trials; KL and errors have records of their own."""
        middle = {
            id(t.part): Trial(t.part, t.part.schemes[len(t.part.schemes) // 2]) for t in trials
        }
        streamed = recorded(
            self._divergence,
            list(middle.values()),
            folder,
            lambda done, total: progress(9 * done, 10 * total),
        )
        every = [*middle.values(), *trials]
        errors = recorded(
            self._error,
            every,
            folder,
            lambda done, total: progress(9 * total + done, 10 * total),
        )
        rates = {
            part: kl / error if error else 0.0
            for part, kl, error in zip(middle, streamed, errors, strict=False)
        }
        return [
            rates[id(trial.part)] * error
            for trial, error in zip(trials, errors[len(middle) :], strict=True)
        ]


class ErrorMeter:
    """Relative weighted squared error of a few rows of every weight."""

    measure = "error"

    def __init__(self, source: Checkpoint) -> None:
        """Prepare; reads nothing yet."""
        self._source = source

    def inputs(self) -> Canonical:
        """Return the identity of the source's shards."""
        return {name: self._source.files[name].identity for name in self._source.index.shards}

    def costs(self, trials: Sequence[Trial], progress: Progress) -> Iterator[float]:
        """Read the rows of each part once and encode them under each scheme."""
        done = 0
        for _, same in groupby(trials, key=lambda trial: id(trial.part)):
            some = list(same)
            yield from self._of_part(some[0].part, [trial.scheme for trial in some])
            done += len(some)
            progress(done, len(trials))

    def _of_part(self, part: Part, schemes: Sequence[Quantized]) -> NDArray[np.float64]:
        planned = [part.under(scheme) for scheme in schemes]
        total = np.zeros(len(schemes))
        for one in part.weights:
            off, size = np.zeros(len(schemes)), 0.0
            for first_row, rows in self._samples(one):
                importance = np.ones((1, rows.shape[1]), np.float32)
                if one.importance is not None:
                    importance = one.importance.of_rows(first_row, len(rows), one.weight.rows)
                weighed = np.repeat(importance, len(rows) // len(importance), axis=0).astype(
                    np.float64
                )
                size += float((weighed * np.square(rows, dtype=np.float64)).sum())
                for i, under in enumerate(planned):
                    made = expanded(under[one.weight.path], rows, first_row)
                    off[i] += (weighed * np.square(made - rows, dtype=np.float64)).sum()
            if size:
                total += off / size
        return total

    def _samples(self, planned: PlannedWeight) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Yield the row of a weight at which some rows begin, and these rows."""
        segments = planned.weight.segments
        count = min(_TENSORS, len(segments))
        numbers = np.unique(np.linspace(0, len(segments) - 1, count).astype(int))
        for segment in (segments[int(number)] for number in numbers):
            units = min(_UNITS, segment.units)
            first = (segment.units - units) // 2
            where = f"{self._source.tensors[segment.source].shard}: tensor {segment.source}"
            loaded = load_parts(
                [(segment, first, first + units)], where, self._source, read_of(self._source)
            )
            rows = loaded.rows(segment, first, first + units)
            yield segment.first_row + first * segment.unit_rows, to_float32(*rows)
