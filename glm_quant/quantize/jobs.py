"""Jobs: the plan cut into pieces that fit in memory and can be done in any order.

A job reads whole rows of one source tensor and fills whole rows of one or more outputs. An expert
is one job; embeddings and other large matrices are several. No two jobs write the same byte, and
together they write every byte of every output tensor once.
"""

from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.header import TensorInfo
from glm_quant.model.geometry import Geometry
from glm_quant.model.restructure import Part, transform_rows
from glm_quant.quantize.encode import Rows, encode, load_rows
from glm_quant.quantize.plan import Plan, PlannedTensor, PlannedWeight

# 16 M elements: 32 MB of bf16. Several workers stay far below 1 GB.
BLOCK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Target:
    """Where a job's rows go: `first_row` counts rows of the output seen as a matrix."""

    weight: PlannedWeight
    part: Part
    first_row: int


@dataclass(frozen=True)
class Job:
    """Rows `begin_row` to `end_row` of a source tensor, seen as a matrix with `width` columns."""

    source: str
    begin_row: int
    end_row: int
    width: int
    targets: tuple[Target, ...]

    @property
    def key(self) -> str:
        """What the journal calls it."""
        return f"{self.source}:{self.begin_row}"

    @property
    def shards(self) -> set[int]:
        """The output shards it writes to."""
        return {t.shard for target in self.targets for t in target.weight.tensors}


def make_jobs(plan: Plan, block_elements: int = BLOCK_ELEMENTS) -> list[Job]:
    """Return every job of a plan, in the order of the plan's weights."""
    feeds: dict[str, list[tuple[PlannedWeight, Part]]] = defaultdict(list)
    for planned in plan.weights:
        for part in planned.weight.parts:
            feeds[part.source].append((planned, part))
    jobs: list[Job] = []
    for source, destinations in feeds.items():
        jobs += _split(source, destinations, block_elements)
    return jobs


def by_source_shard(jobs: Iterable[Job], weight_map: Mapping[str, str]) -> dict[str, list[Job]]:
    """Group jobs by the source shard they read, shards in stored order."""
    grouped: dict[str, list[Job]] = defaultdict(list)
    for job in jobs:
        grouped[weight_map[job.source]].append(job)
    return dict(sorted(grouped.items()))


def _split(
    source: str, destinations: list[tuple[PlannedWeight, Part]], block_elements: int
) -> list[Job]:
    unit_rows = destinations[0][1].unit[0]
    units = destinations[0][1].units
    elements = sum(
        planned.weight.params // len(planned.weight.parts) for planned, _ in destinations
    )
    width = elements // (unit_rows * units)
    step = max(1, block_elements // (unit_rows * width))
    return [
        Job(
            source,
            first * unit_rows,
            min(first + step, units) * unit_rows,
            width,
            tuple(
                Target(planned, part, part.first_row + first * part.unit[1])
                for planned, part in destinations
            ),
        )
        for first in range(0, units, step)
    ]


def encode_job(
    job: Job, data: NDArray[np.uint8], info: TensorInfo, geometry: Geometry, shards: Container[int]
) -> Iterator[tuple[PlannedTensor, int, NDArray[np.uint8]]]:
    """Yield what a job writes: the tensor, its first row there, and the bytes.

    Args:
        job: what to do.
        data: the bytes of its source rows.
        info: its source tensor.
        geometry: the model's dims.
        shards: output shards that are wanted; what lies in others is left out.

    Raises:
        WeightError: a source value is NaN, Inf or does not fit its target dtype.
    """
    where = f"{info.shard}: tensor {job.source}"
    rows = load_rows(data, info.dtype, job.width, where)
    for target in job.targets:
        tensors = target.weight.tensors
        if not any(tensor.shard in shards for tensor in tensors):
            continue
        made = transform_rows(rows.bits, target.part.transform, geometry)
        energy = None
        if target.weight.energy is not None:
            all_rows = target.weight.weight.rows
            energy = target.weight.energy.of_rows(target.first_row, len(made), all_rows)
        encoded = encode(Rows(made, rows.dtype), target.weight.scheme, where, energy)
        for tensor, array in zip(tensors, encoded, strict=True):
            if tensor.shard in shards:
                yield tensor, target.first_row, array
