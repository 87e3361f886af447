"""Jobs: the plan cut into pieces that fit in memory and can be done in any order.

A job reads whole rows of one source tensor and fills whole rows of one or more outputs. An expert
is one job; embeddings and other large matrices are several. No two jobs write the same byte, and
together they write every byte of every output tensor once.
"""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.fp8 import FP8_DTYPE, scale_name
from glm_quant.checkpoint.header import ITEM_SIZE, TensorInfo
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.encode import Rows, encode, load_rows
from glm_quant.codes.fidelity import Fidelity, measure
from glm_quant.codes.scheme import Quantized
from glm_quant.errors import RecipeError
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.model.geometry import Geometry
from glm_quant.model.restructure import Part, transform_rows
from glm_quant.quantize.layout import PlannedTensor, PlannedWeight
from glm_quant.quantize.plan import Plan

# 16 M elements: 32 MB of bf16. Several workers stay far below 1 GB.
BLOCK_ELEMENTS = 1 << 24
# Far above what any sensible recipe needs, far below what one process may open.
MAX_OPEN_OUTPUTS = 64

# (tensor, first byte in its data, number of bytes) to those bytes.
Read = Callable[[TensorInfo, int, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Target:
    """Where a job's rows go: `first_row` counts rows of the output seen as a matrix."""

    weight: PlannedWeight
    part: Part
    first_row: int


@dataclass(frozen=True)
class Job:
    """Rows `begin_row` to `end_row` of a source tensor, seen as a matrix with `width` columns.

    `calibrated` names what its codes are calibrated with; empty where nothing is.
    """

    source: str
    begin_row: int
    end_row: int
    width: int
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


class LoadedRows(NamedTuple):
    """A job's source rows; the sha256 of their stored bytes, whether those are all zero.

    `where` is what messages call them.
    """

    rows: Rows
    sha256: str
    all_zero: bool
    where: str


class Encoded(NamedTuple):
    """What a job makes of one weight: (tensor, first row there, bytes), and how near it came."""

    weight: PlannedWeight
    written: list[tuple[PlannedTensor, int, NDArray[np.uint8]]]
    fidelity: Fidelity | None


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


def _split(
    source: str, destinations: list[tuple[PlannedWeight, Part]], block_elements: int
) -> list[Job]:
    unit_rows = destinations[0][1].unit[0]
    units = destinations[0][1].units
    elements = sum(
        planned.weight.params // len(planned.weight.parts) for planned, _ in destinations
    )
    width = elements // (unit_rows * units)
    # Whole units of the transform, which moves rows within one.
    step = max(1, block_elements // (unit_rows * width))
    # Part of the key: codes of an earlier calibration are not taken for those of this one.
    calibrated: list[Canonical] = [
        [p.weight.name, p.calibrated] for p, _ in destinations if p.calibrated
    ]
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
            fingerprint(calibrated)[:16] if calibrated else "",
        )
        for first in range(0, units, step)
    ]


def load_job(job: Job, checkpoint: Checkpoint, read: Read) -> LoadedRows:
    """Read a job's rows and look at every value.

    Args:
        job: what to read.
        checkpoint: knows where the rows lie.
        read: returns bytes of a tensor: (tensor, first byte in its data, how many).

    Raises:
        WeightError: a value is NaN or Inf.
    """
    info = checkpoint.tensors[job.source]
    row_bytes = job.width * ITEM_SIZE[info.dtype]
    data = read(info, job.begin_row * row_bytes, (job.end_row - job.begin_row) * row_bytes)
    # Of the stored bytes: what the manifest says of a source holds for FP8 scales too.
    digest = hashlib.sha256(data.data)
    scales: NDArray[np.float32] | None = None
    if info.dtype == FP8_DTYPE:
        scale_info = checkpoint.tensors[scale_name(job.source)]
        stored = read(scale_info, 0, scale_info.size_bytes)
        digest.update(stored.data)
        scales = stored.view(np.float32).reshape(scale_info.shape)
    where = f"{info.shard}: tensor {job.source}"
    rows = load_rows(data, info.dtype, job.width, where, scales=scales, first_row=job.begin_row)
    return LoadedRows(rows, digest.hexdigest(), not data.any(), where)


def encode_job(
    job: Job, loaded: LoadedRows, geometry: Geometry, shards: Container[int]
) -> Iterator[Encoded]:
    """Yield what a job writes.

    Args:
        job: what to do.
        loaded: its source rows.
        geometry: the model's dims.
        shards: output shards that are wanted; what lies in others is left out.

    Raises:
        WeightError: a value does not fit its target dtype, or the codes are too far from it.
    """
    rows, where = loaded.rows, loaded.where
    for target in job.targets:
        weight = target.weight
        if not any(tensor.shard in shards for tensor in weight.tensors):
            continue
        bits = transform_rows(rows.bits, target.part.transform, geometry)
        importance = None
        if weight.importance is not None:
            importance = weight.importance.of_rows(target.first_row, len(bits), weight.weight.rows)
        # Cached: the many jobs of a layer share few factors.
        factor = weight.factor.load() if weight.factor is not None else None
        arrays = encode(Rows(bits, rows.dtype), weight.scheme, where, importance, factor)
        fidelity = None
        if isinstance(weight.scheme, Quantized):
            # While the rows are at hand; held against what was stored, not what was meant.
            fidelity = measure(bits, rows.dtype, weight.scheme, arrays)
            fidelity.check(weight.scheme, where)
        yield Encoded(
            weight,
            [
                (tensor, target.first_row, array.reshape(-1).view(np.uint8))
                for tensor, array in zip(weight.tensors, arrays, strict=True)
                if tensor.shard in shards
            ],
            fidelity,
        )
