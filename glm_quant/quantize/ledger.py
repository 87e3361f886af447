"""What a plan asks for, and what of it is done: jobs, fingerprints, records."""

import hashlib
import logging
from functools import cached_property
from pathlib import Path

from glm_quant.artifact import FileDigest
from glm_quant.checkpoint.fp8 import FP8_DTYPE, scale_name
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.encode import VERSION
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.model.restructure import Part
from glm_quant.quantize.jobs import Job, make_jobs
from glm_quant.quantize.plan import Plan, PlannedWeight
from glm_quant.quantize.records import KeptElsewhere, ShardInputs, ShardRecord
from glm_quant.quantize.schedule import Schedule
from glm_quant.workspace import Workspace

_log = logging.getLogger(__name__)


class Ledger:
    """One plan in one workspace."""

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
    def schedule(self) -> Schedule:
        """In which order source shards are read."""
        return Schedule.of(self.jobs, self.checkpoint.index.weight_map)

    @cached_property
    def inputs(self) -> list[ShardInputs]:
        """What the fingerprint of each output shard is made of."""
        self.checkpoint.require_weights()
        return [self._inputs_of(shard) for shard in range(len(self.plan.shards))]

    @cached_property
    def weights_of(self) -> list[list[PlannedWeight]]:
        """The weights that have a tensor in each output shard."""
        found: list[list[PlannedWeight]] = [[] for _ in self.plan.shards]
        for planned in self.plan.weights:
            for shard in sorted({tensor.shard for tensor in planned.tensors}):
                found[shard].append(planned)
        return found

    @cached_property
    def keys(self) -> dict[str, str]:
        """The hash of all that decides the stored bytes of each weight, by its name."""
        return {
            planned.weight.name: weight_key(planned, self.checkpoint)
            for planned in self.plan.weights
        }

    def fingerprint(self, shard: int) -> str:
        """Return the fingerprint of an output shard: of everything that decides its bytes."""
        return fingerprint(self.inputs[shard].model_dump())

    def layout(self, shard: int) -> str:
        """Return the fingerprint of an output shard without its calibration: known before that."""
        layout = self.inputs[shard].model_dump()
        layout["schemes"] = {
            planned.weight.name: planned.scheme.describe() for planned in self.weights_of[shard]
        }
        return fingerprint(layout)

    @cached_property
    def whole_layout(self) -> str:
        """The fingerprint of all output shards without their calibration."""
        return fingerprint([self.layout(shard) for shard in range(len(self.plan.shards))])

    def record_path(self, shard: int) -> Path:
        """Return where the record of an output shard stands."""
        return self.workspace.shard_records / f"{self.plan.shards[shard].name}.json"

    def finished(self, shard: int) -> ShardRecord | None:
        """Return the record of an output shard if it is today's and the file is kept."""
        record = ShardRecord.load(self.record_path(shard))
        if record is None or not all(map(self.is_kept, record.outputs)):
            return None
        if record.fingerprint != self.fingerprint(shard):
            today, then = self.inputs[shard].model_dump(), record.inputs.model_dump()
            drifted = [key for key in today if today[key] != then[key]]
            name = self.plan.shards[shard].name
            _log.info("%s is made again: %s changed", name, ", ".join(drifted))
            return None
        return record

    def elsewhere_path(self, name: str) -> Path:
        """Return where it stands that a shard's local copy was let go."""
        return self.workspace.shard_records / f"{name}.elsewhere.json"

    def is_kept(self, file: FileDigest) -> bool:
        """Whether a finished file is here, or is a shard that was let go and is kept elsewhere."""
        if file.is_there(self.workspace.checkpoint):
            return True
        elsewhere = KeptElsewhere.load(self.elsewhere_path(file.path))
        return elsewhere is not None and elsewhere.outputs == [file]

    def unfinished(self) -> list[int]:
        """Return the output shards that are to be made."""
        return [i for i in range(len(self.plan.shards)) if self.finished(i) is None]

    def _inputs_of(self, shard: int) -> ShardInputs:
        weight_map, files = self.checkpoint.index.weight_map, self.checkpoint.files
        read = {job.source for job in self.jobs_of[shard]}
        read |= {
            scale_name(name) for name in read if self.checkpoint.tensors[name].dtype == FP8_DTYPE
        }
        return ShardInputs(
            version=VERSION,
            layout=hashlib.sha256(self.plan.shards[shard].header).hexdigest(),
            schemes={planned.weight.name: planned.describe() for planned in self.weights_of[shard]},
            sources={name: files[name].identity for name in sorted({weight_map[s] for s in read})},
        )


def weight_key(planned: PlannedWeight, checkpoint: Checkpoint) -> str:
    """Return the hash of all that decides the stored bytes of a weight."""
    parts: list[Canonical] = [_part_key(part, checkpoint) for part in planned.weight.parts]
    return fingerprint(
        {
            "version": VERSION,
            "scheme": planned.describe(),
            "shape": planned.weight.shape,
            "parts": parts,
        }
    )


def _part_key(part: Part, checkpoint: Checkpoint) -> Canonical:
    info = checkpoint.tensors[part.source]
    places = [info]
    if info.dtype == FP8_DTYPE:
        places.append(checkpoint.tensors[scale_name(part.source)])
    return [
        part.transform,
        part.first_row,
        info.dtype,
        *[f"{_content(checkpoint, p.shard)}:{p.begin}:{p.end}" for p in places],
    ]


def _content(checkpoint: Checkpoint, shard: str) -> str:
    """Return the identity of a file; size and time alone say nothing outside of one folder."""
    identity = checkpoint.files[shard].identity
    return (
        identity
        if ":" in identity and not identity.startswith("stat:")
        else (f"{checkpoint.source.uri}/{shard}:{identity}")
    )
