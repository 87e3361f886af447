"""Jobs: the plan cut into pieces that fit in memory and can be done in any order.

A job reads a part of one source tensor, and what else its outputs are made of, and fills whole
rows of one or more outputs. An expert is one job; embeddings and other large matrices are several.
Outputs that are made of the same tensor share its jobs. No two jobs write the same byte, and
together they write every byte of every output tensor once.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glm_quant.architectures.segments import Segment, unit_elements
from glm_quant.codes.encode import encode
from glm_quant.codes.fidelity import Fidelity, measure
from glm_quant.codes.scheme import Quantized
from glm_quant.errors import RecipeError
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.quantize.layout import PlannedTensor, PlannedWeight
from glm_quant.quantize.load import LoadedJob
from glm_quant.quantize.plan import Plan

# 16 M elements: 32 MB of bf16. Several workers stay far below 1 GB.
BLOCK_ELEMENTS = 1 << 24
# Far above what any sensible recipe needs, far below what one process may open.
MAX_OPEN_OUTPUTS = 64


@dataclass(frozen=True)
class Target:
    """What a job fills: units `begin` to `end` of a segment of a weight."""

    weight: PlannedWeight
    segment: Segment
    begin: int
    end: int

    @property
    def first_row(self) -> int:
        """The first row of the output, seen as a matrix, that it fills."""
        return self.segment.first_row + self.begin * self.segment.unit_rows


@dataclass(frozen=True)
class Job:
    """A part of a source tensor that is read, and what is filled from it.

    Attributes:
        source: the tensor that most bytes are read from.
        begin_row: where the part begins, in rows of the tensor seen as a matrix; with the tensor's
            name it names the job.
        size_bytes: how much of the tensor it stands for.
        parts: what is read: all targets that the plan has, whichever of them are wanted.
        targets: what is written.
        calibrated: names what the codes are calibrated with; empty where nothing is.
    """

    source: str
    begin_row: int
    size_bytes: int
    parts: tuple[tuple[Segment, int, int], ...]
    targets: tuple[Target, ...]
    calibrated: str = ""

    @property
    def block(self) -> str:
        """What it reads."""
        return f"{self.source}:{self.begin_row}"

    @property
    def key(self) -> str:
        """What the journal calls it: other codes of the same rows are another job."""
        return f"{self.block}:{self.calibrated}" if self.calibrated else self.block

    @property
    def shards(self) -> set[int]:
        """The output shards it writes to."""
        return {t.shard for target in self.targets for t in target.weight.tensors}


class Encoded(NamedTuple):
    """What a job makes of one weight: (tensor, first row there, bytes), and how near it came."""

    weight: PlannedWeight
    written: list[tuple[PlannedTensor, int, NDArray[np.uint8]]]
    fidelity: Fidelity | None


def make_jobs(plan: Plan, block_elements: int = BLOCK_ELEMENTS) -> list[Job]:
    """Return every job of a plan, in the order of the plan's weights."""
    feeds: dict[str, list[tuple[PlannedWeight, Segment]]] = defaultdict(list)
    for planned in plan.weights:
        for segment in planned.weight.segments:
            feeds[segment.source].append((planned, segment))
    jobs: list[Job] = []
    for destinations in feeds.values():
        jobs += _jobs_of_source(destinations, block_elements)
    return jobs


def block_of(key: str) -> str:
    """Return what the job of a key reads."""
    return ":".join(key.split(":")[:2])


def by_source_shard(jobs: Iterable[Job], weight_map: Mapping[str, str]) -> dict[str, list[Job]]:
    """Group jobs by the source shard they read, shards in stored order."""
    grouped: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        grouped[weight_map[job.source]].append(job)
    return dict(sorted(grouped.items()))


def source_order(jobs: Iterable[Job], weight_map: Mapping[str, str]) -> tuple[str, ...]:
    """Return the source shards that jobs read, in the order in which they are stored and read.

    Outputs are laid out in the order of their sources. So those that are begun and not full stay
    few: for GLM-5.2 three, since an expert stack fills while the four or five shards of its layer
    pass. Any other order would leave more open.
    """
    return tuple(sorted({weight_map[job.source] for job in jobs}))


def count_open_outputs(jobs: Sequence[Job], weight_map: Mapping[str, str]) -> int:
    """Return how many outputs are begun and not full at a time, at most."""
    order = source_order(jobs, weight_map)
    position = {name: i for i, name in enumerate(order)}
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for job in jobs:
        place = position[weight_map[job.source]]
        for shard in job.shards:
            first[shard] = min(first.get(shard, place), place)
            last[shard] = max(last.get(shard, place), place)
    # +1 where an output is begun, -1 after its last source shard.
    changes = [0] * (len(order) + 1)
    for shard in first:
        changes[first[shard]] += 1
        changes[last[shard] + 1] -= 1
    return max(accumulate(changes), default=0)


def check_open_outputs(count: int) -> None:
    """Refuse a plan that would keep too many outputs open.

    Raises:
        RecipeError: it would.
    """
    if count > MAX_OPEN_OUTPUTS:
        raise RecipeError(
            f"{count} output shards would be open at a time, at most {MAX_OPEN_OUTPUTS} are: "
            "`shard_bytes` is too small for layers of this size. Raise it in the recipe."
        )


def _jobs_of_source(
    destinations: list[tuple[PlannedWeight, Segment]], block_elements: int
) -> list[Job]:
    """Cut what one source tensor feeds: together where all of it has as many units, else apart."""
    if len({segment.units for _, segment in destinations}) == 1:
        return _cut(destinations, block_elements, 0)
    jobs: list[Job] = []
    for planned, segment in destinations:
        reads = [part for part in segment.reads(0, 1) if part.name == segment.source]
        width = max(1, segment.source_elements // max(1, segment.source_rows))
        first_row = min((part.begin for part in reads), default=0) // width
        jobs += _cut([(planned, segment)], block_elements, first_row)
    return jobs


def _cut(
    destinations: list[tuple[PlannedWeight, Segment]], block_elements: int, first_row: int
) -> list[Job]:
    main = destinations[0][1]
    step = max(1, block_elements // sum(unit_elements(segment) for _, segment in destinations))
    # Rows of the source that a unit takes; where they do not divide, units are counted instead.
    rows, rest = divmod(main.source_rows, main.units)
    unit_rows = rows if rows and not rest else 1
    # Part of the key: codes of an earlier calibration are not taken for those of this one.
    calibrated: list[Canonical] = [
        [p.weight.name, p.calibrated] for p, _ in destinations if p.calibrated
    ]
    jobs: list[Job] = []
    for begin in range(0, main.units, step):
        end = min(begin + step, main.units)
        jobs.append(
            Job(
                main.source,
                first_row + begin * unit_rows,
                main.source_bytes * (end - begin) // main.units,
                tuple((segment, begin, end) for _, segment in destinations),
                tuple(Target(planned, segment, begin, end) for planned, segment in destinations),
                fingerprint(calibrated)[:16] if calibrated else "",
            )
        )
    return jobs


def encode_job(job: Job, loaded: LoadedJob, shards: Container[int]) -> Iterator[Encoded]:
    """Yield what a job writes.

    Args:
        job: what to do.
        loaded: what of the source it reads.
        shards: output shards that are wanted; what lies in others is left out.

    Raises:
        WeightError: a value does not fit its target dtype, or the codes are too far from it.
    """
    for target in job.targets:
        weight = target.weight
        if not any(tensor.shard in shards for tensor in weight.tensors):
            continue
        rows = loaded.rows(target.segment, target.begin, target.end)
        importance = None
        if weight.importance is not None:
            all_rows = weight.weight.rows
            importance = weight.importance.of_rows(target.first_row, len(rows.bits), all_rows)
        # Cached: the many jobs of a layer share few factors.
        factor = weight.factor.load() if weight.factor is not None else None
        arrays = encode(rows, weight.scheme, loaded.where, importance, factor)
        fidelity = None
        if isinstance(weight.scheme, Quantized):
            # While the rows are at hand; held against what was stored, not what was meant.
            fidelity = measure(rows.bits, rows.dtype, weight.scheme, arrays)
            fidelity.check(weight.scheme, loaded.where)
        yield Encoded(
            weight,
            [
                (tensor, target.first_row, array.reshape(-1).view(np.uint8))
                for tensor, array in zip(weight.tensors, arrays, strict=True)
                if tensor.shard in shards
            ],
            fidelity,
        )
