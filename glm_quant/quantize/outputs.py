"""The output shards of a plan in a workspace: what each is made of, and whether it is finished."""

import hashlib
import logging
from functools import cached_property
from pathlib import Path

from glm_quant.architectures.expressions import describe
from glm_quant.architectures.segments import Segment
from glm_quant.artifact import FileDigest
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.encode import VERSION
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.quantize.jobs import Job, count_open_outputs, make_jobs, source_order
from glm_quant.quantize.layout import PlannedWeight
from glm_quant.quantize.plan import Plan
from glm_quant.quantize.records import RemoteShard, ShardInputs, ShardRecord
from glm_quant.workspace import Workspace

_log = logging.getLogger(__name__)


class Outputs:
    """The output shards of one plan in one workspace, by number.

    Attributes:
        checkpoint: the source.
        plan: what is made of it.
        workspace: where.
        jobs: the plan cut into jobs.
        jobs_of: those that write to each shard.
    """

    def __init__(self, checkpoint: Checkpoint, plan: Plan, workspace: Workspace) -> None:
        """Cut the plan into jobs; nothing is read yet."""
        self.checkpoint = checkpoint
        self.plan = plan
        self.workspace = workspace
        self.jobs = make_jobs(plan)
        self.jobs_of: list[list[Job]] = [[] for _ in plan.shards]
        for job in self.jobs:
            for shard in job.shards:
                self.jobs_of[shard].append(job)

    @cached_property
    def source_order(self) -> tuple[str, ...]:
        """The source shards that are read, in order."""
        return source_order(self.jobs, self.checkpoint.index.weight_map)

    @cached_property
    def most_open(self) -> int:
        """How many shards at most are begun and not full at a time."""
        return count_open_outputs(self.jobs, self.checkpoint.index.weight_map)

    @property
    def peak_disk_bytes(self) -> int:
        """The most that stands on disk at a time: all outputs, and the fetched source shards."""
        source = self.checkpoint.source
        sizes = sorted(
            self.checkpoint.files[name].size_bytes
            for name in self.source_order
            if name in self.checkpoint.files
        )
        fetched = sum(sizes[-source.places :]) if source.places else 0
        return sum(shard.size_bytes for shard in self.plan.shards) + fetched

    @cached_property
    def inputs(self) -> list[ShardInputs]:
        """What the fingerprint of each shard is made of."""
        self.checkpoint.require_weights()
        return [self._inputs_of(shard) for shard in range(len(self.plan.shards))]

    @cached_property
    def weights_of(self) -> list[list[PlannedWeight]]:
        """The weights that have a tensor in each shard."""
        weights: list[list[PlannedWeight]] = [[] for _ in self.plan.shards]
        for planned in self.plan.weights:
            for shard in sorted({tensor.shard for tensor in planned.tensors}):
                weights[shard].append(planned)
        return weights

    @cached_property
    def keys(self) -> dict[str, str]:
        """The hash of all that decides the stored bytes of each weight, by its name."""
        return {
            planned.weight.name: weight_key(planned, self.checkpoint)
            for planned in self.plan.weights
        }

    def fingerprint(self, shard: int) -> str:
        """Return the fingerprint of a shard: of everything that decides its bytes."""
        return fingerprint(self.inputs[shard].model_dump())

    def layout(self, shard: int) -> str:
        """Return the fingerprint of a shard without its calibration, which is known later."""
        layout = self.inputs[shard].model_dump()
        # Schemes without what calibration adds to them.
        layout["schemes"] = {
            planned.weight.name: planned.scheme.describe() for planned in self.weights_of[shard]
        }
        return fingerprint(layout)

    @cached_property
    def whole_layout(self) -> str:
        """The fingerprint of all shards without their calibration."""
        return fingerprint([self.layout(shard) for shard in range(len(self.plan.shards))])

    def record_path(self, shard: int) -> Path:
        """Return where the record of a shard stands."""
        return self.workspace.shard_records / f"{self.plan.shards[shard].name}.json"

    def finished(self, shard: int) -> ShardRecord | None:
        """Return the record of a shard if it is today's and the file is kept."""
        record = ShardRecord.load(self.record_path(shard))
        if record is None or not all(map(self.is_kept, record.outputs)):
            return None
        if record.fingerprint != self.fingerprint(shard):
            today, recorded = self.inputs[shard].model_dump(), record.inputs.model_dump()
            # Said, because making a shard again may take an hour.
            changed = [key for key in today if today[key] != recorded[key]]
            name = self.plan.shards[shard].name
            _log.info("%s is made again: %s changed", name, ", ".join(changed))
            return None
        return record

    def unfinished(self) -> list[int]:
        """Return the shards that are to be made."""
        return [i for i in range(len(self.plan.shards)) if self.finished(i) is None]

    def remote_record_path(self, name: str) -> Path:
        """Return where it is recorded that a shard stands at a target only."""
        return self.workspace.shard_records / f"{name}.elsewhere.json"

    def is_kept(self, file: FileDigest) -> bool:
        """Whether a finished file is here, or is a shard that stands at a target only."""
        if file.is_there(self.workspace.checkpoint):
            return True
        remote = RemoteShard.load(self.remote_record_path(file.path))
        return remote is not None and remote.outputs == [file]

    def _inputs_of(self, shard: int) -> ShardInputs:
        weight_map, files = self.checkpoint.index.weight_map, self.checkpoint.files
        sources = {
            str(leaf.name)
            for job in self.jobs_of[shard]
            for segment, _, _ in job.parts
            for leaf in segment.source_tensors
        }
        return ShardInputs(
            version=VERSION,
            layout=hashlib.sha256(self.plan.shards[shard].header).hexdigest(),
            schemes={planned.weight.name: planned.describe() for planned in self.weights_of[shard]},
            sources={
                name: files[name].identity for name in sorted({weight_map[s] for s in sources})
            },
        )


def weight_key(planned: PlannedWeight, checkpoint: Checkpoint) -> str:
    """Return the hash of all that decides the stored bytes of a weight."""
    return fingerprint(
        {
            "version": VERSION,
            "scheme": planned.describe(),
            "shape": planned.weight.shape,
            "parts": [_segment_key(segment, checkpoint) for segment in planned.weight.segments],
        }
    )


def _segment_key(segment: Segment, checkpoint: Checkpoint) -> Canonical:
    places = [checkpoint.tensors[str(leaf.name)] for leaf in segment.source_tensors]
    return [
        "copy" if segment.is_copy else describe(segment.expression),
        segment.first_row,
        [place.dtype for place in places],
        *[f"{_content(checkpoint, p.shard)}:{p.begin}:{p.end}" for p in places],
    ]


def _content(checkpoint: Checkpoint, shard: str) -> str:
    """Return what identifies a file's content.

    Size and time alone say nothing outside of one folder, so its place is added to them.
    """
    identity = checkpoint.files[shard].identity
    is_content = ":" in identity and not identity.startswith("stat:")
    return identity if is_content else f"{checkpoint.source.uri}/{shard}:{identity}"
