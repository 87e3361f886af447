"""Finished shards outlive a copy of their source: the same bytes with other times of change.

A folder promises no digest, so its files are known by size and time of change. Where only the times
differ, the rows that a shard was made of are read again and held against the digests that were
recorded of all of them; if they are equal the shard is what it would become.
"""

import logging

from glm_quant.errors import WeightError
from glm_quant.fingerprint import fingerprint
from glm_quant.quantize.jobs import Job
from glm_quant.quantize.load import load_parts, read_of
from glm_quant.quantize.outputs import Outputs
from glm_quant.quantize.records import ShardRecord

_log = logging.getLogger(__name__)


def keep_unchanged(outputs: Outputs) -> None:
    """Record finished shards as today's whose source files have another time, and the same bytes.

    Args:
        outputs: of a plan, in a workspace that the caller holds.
    """
    for shard in outputs.unfinished():
        record = ShardRecord.load(outputs.record_path(shard))
        if record is None or not all(map(outputs.is_kept, record.outputs)):
            continue
        touched = _touched_files(outputs, shard, record)
        if not touched:
            continue
        name = outputs.plan.shards[shard].name
        if _has_same_rows(outputs, shard, record):
            for file in touched:
                _log.info(
                    "source shard %s: modified time; its rows have the recorded sha256: %s is kept",
                    *(file, name),
                )
            inputs = outputs.inputs[shard]
            changes = {
                "inputs": inputs,
                "fingerprint": fingerprint(inputs.model_dump()),
                "keys": {weight: outputs.keys[weight] for weight in record.keys},
            }
            record.model_copy(update=changes).save(outputs.record_path(shard))
        else:
            _log.info("%s is made again: %s has other bytes", name, ", ".join(touched))


def _touched_files(outputs: Outputs, shard: int, record: ShardRecord) -> list[str]:
    """Return the source files that have another time of change, if nothing else changed."""
    today, recorded = outputs.inputs[shard], record.inputs
    if today.model_copy(update={"sources": recorded.sources}) != recorded:
        return []
    if today.sources.keys() != recorded.sources.keys():
        return []
    pairs = {name: (today.sources[name], recorded.sources[name]) for name in today.sources}
    changed = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    sizes = [tuple(map(_size, pair)) for pair in changed.values()]
    return sorted(changed) if all(now and now == then for now, then in sizes) else []


def _size(identity: str) -> str | None:
    """Return the size in the identity of a folder's file; other identities are digests."""
    kind, _, rest = identity.partition(":")
    return rest.partition(":")[0] if kind == "stat" else None


def _has_same_rows(outputs: Outputs, shard: int, record: ShardRecord) -> bool:
    blocks: dict[str, list[Job]] = {}
    for job in outputs.jobs_of[shard]:
        blocks.setdefault(job.source, []).append(job)
    if blocks.keys() != record.sources.keys():
        return False
    return all(
        len(jobs) == len(record.sources[source])
        and all(
            _digest(outputs, job) == sha256
            for job, sha256 in zip(jobs, record.sources[source], strict=True)
        )
        for source, jobs in blocks.items()
    )


def _digest(outputs: Outputs, job: Job) -> str | None:
    """Return the sha256 of all that a job reads; None if that holds NaN or Inf."""
    checkpoint = outputs.checkpoint
    try:
        return load_parts(job.parts, job.source, checkpoint, read_of(checkpoint)).sha256
    except WeightError:
        return None
