"""What remains to be done for the outputs of a plan, and the pipeline that does it.

A job is done when the journal has it; a weight that another plan has made is copied instead. When
an output is full it is read once more, gets its name, and is recorded.
"""

import hashlib
from collections import defaultdict
from collections.abc import Collection, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

from glm_quant.artifact import FileDigest
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.codes.fidelity import Fidelity
from glm_quant.errors import IntegrityError
from glm_quant.quantize.job_runner import JobRunner
from glm_quant.quantize.journal import Entry, Piece
from glm_quant.quantize.outputs import Outputs
from glm_quant.quantize.partial import PartialOutputs
from glm_quant.quantize.pipeline import Pipeline, Step, WorkItem
from glm_quant.quantize.records import ShardRecord
from glm_quant.quantize.reuse import Reusables, ReusableTensor, read_reusable


@dataclass(frozen=True)
class Wanted:
    """Which outputs a pipeline is for.

    Attributes:
        unfinished: those that are to be made; jobs of a source shard at hand are done for all.
        completed: of these, those that are brought to completion, in this order.
        reusable: the tensors of each weight that need not be made.
    """

    unfinished: list[int]
    completed: list[int]
    reusable: Reusables


@contextmanager
def running_pipeline(outputs: Outputs, wanted: Wanted, workers: int) -> Generator[Pipeline]:
    """Run a pipeline over what remains; at the end of the block it stops, and keeps what is done.

    Args:
        outputs: those of the plan.
        wanted: which of them.
        workers: threads that encode.

    Raises:
        WeightError: tensors that earlier runs read are equal or all zero.
    """
    # A journal belongs to a layout; what is calibrated is in the keys of its jobs.
    partial = PartialOutputs(outputs.workspace.partial, outputs.plan.shards, outputs.whole_layout)
    try:
        for shard in wanted.unfinished:
            # A crash may have come between a shard's name and its record.
            partial.take_back(shard, outputs.workspace.checkpoint)
            if not partial.is_intact(shard):
                partial.forget(shard, _job_keys(outputs, shard))
        pipeline = _make_pipeline(outputs, partial, wanted)
        pipeline.start(workers)
        try:
            yield pipeline
        finally:
            pipeline.stop()
            if pipeline.broken is not None:
                # Flushed first: what is journaled after the shard was forgotten would count.
                partial.flush()
                partial.forget(pipeline.broken, _job_keys(outputs, pipeline.broken))
    finally:
        partial.close()


def _job_keys(outputs: Outputs, shard: int) -> set[str]:
    return {job.key for job in outputs.jobs_of[shard]}


def _make_pipeline(outputs: Outputs, partial: PartialOutputs, wanted: Wanted) -> Pipeline:
    unfinished = set(wanted.unfinished)
    finished = (
        record
        for shard in range(len(outputs.plan.shards))
        if shard not in unfinished and (record := outputs.finished(shard))
    )
    runner = JobRunner(outputs, partial, finished)
    items = _remaining_items(outputs, partial, runner, wanted)

    def finish(shard: int, full: bool) -> ShardRecord | None:
        return _finish(outputs, partial, wanted.reusable, shard, full)

    pipeline = Pipeline(
        outputs.checkpoint.source,
        partial,
        _steps(items.values(), wanted.completed),
        {
            shard: {key for key, item in items.items() if shard in item.shards}
            for shard in wanted.completed
        },
        finish,
        outputs.workspace.root,
    )
    # All source shards that will be needed, so that a source may fetch ahead.
    order = [*wanted.completed, *(i for i in wanted.unfinished if i not in wanted.completed)]
    outputs.checkpoint.source.expect([name for name, _ in _needs(items.values(), order) if name])
    return pipeline


def _remaining_items(
    outputs: Outputs, partial: PartialOutputs, runner: JobRunner, wanted: Wanted
) -> dict[str, WorkItem]:
    """Return what is not journaled yet, by key; journaled jobs that no item repeats are dropped."""
    unfinished = set(wanted.unfinished)
    items: dict[str, WorkItem] = {}
    for job in outputs.jobs:
        # One source may feed weights of which another plan has made only some.
        targets = tuple(t for t in job.targets if t.weight.weight.name not in wanted.reusable)
        if targets and job.shards & unfinished:
            items[job.key] = runner.work_item(replace(job, targets=targets), unfinished)
    for tensors in wanted.reusable.values():
        for tensor in tensors.values():
            if tensor.target.shard in unfinished:
                items[_copy_key(tensor)] = _copy_item(partial, tensor)
    partial.keep_only(unfinished, items.keys())
    return {key: item for key, item in items.items() if key not in partial.done}


def _steps(items: Collection[WorkItem], outputs: list[int]) -> list[Step]:
    """Return what outputs need, and whatever else the source shards that they need allow."""
    by_source: dict[str | None, list[WorkItem]] = defaultdict(list)
    for item in items:
        by_source[item.source].append(item)
    return [
        Step(source, by_source[source] if source else copies)
        for source, copies in _needs(items, outputs)
    ]


def _needs(
    items: Collection[WorkItem], outputs: list[int]
) -> Iterator[tuple[str | None, list[WorkItem]]]:
    """Yield each source shard that outputs need, once; and what they need besides."""
    items_of: dict[int, list[WorkItem]] = defaultdict(list)
    for item in items:
        for shard in item.shards:
            items_of[shard].append(item)
    yielded: set[str] = set()
    for shard in outputs:
        copies = [item for item in items_of[shard] if item.source is None]
        if copies:
            yield None, copies
        # A source shard that an earlier output needed is done for this one by then.
        sources = {item.source for item in items_of[shard] if item.source} - yielded
        yielded |= sources
        yield from ((source, []) for source in sorted(sources))


def _copy_key(tensor: ReusableTensor) -> str:
    return f"copy:{tensor.target.name}:{tensor.sha256[:16]}"


def _copy_item(partial: PartialOutputs, tensor: ReusableTensor) -> WorkItem:
    return WorkItem(
        _copy_key(tensor),
        frozenset({tensor.target.shard}),
        tensor.target.size_bytes,
        None,
        lambda _: _copy(partial, tensor),
    )


def _copy(partial: PartialOutputs, tensor: ReusableTensor) -> Entry:
    """Copy a tensor that was made before. Runs in an encoder.

    Raises:
        IntegrityError: its bytes are not those that were recorded.
    """
    digest = hashlib.sha256()
    pieces: list[Piece] = []
    for first_row, data in read_reusable(tensor):
        digest.update(data.data)
        pieces.append(partial.write(tensor.target, first_row, data))
    # The entry is made only if they agree: until then the bytes written do not count.
    if digest.hexdigest() != tensor.sha256:
        raise IntegrityError(
            f"{tensor.path}: tensor {tensor.target.name} has sha256 {digest.hexdigest()}, the "
            f"record says {tensor.sha256}. The file changed after it was made; delete it and "
            "run again, and the tensor is made from the source."
        )
    return Entry(_copy_key(tensor), digest.hexdigest(), tuple(pieces))


def _finish(
    outputs: Outputs, partial: PartialOutputs, reusable: Reusables, shard: int, full: bool
) -> ShardRecord | None:
    """Check what there is of an output; publish it if it is full. Runs in the finisher."""
    try:
        if not full:
            partial.check_ahead(shard)
            return None
        digest, tensors = partial.check(shard)
    except IntegrityError as error:
        raise IntegrityError(
            f"{error} The partial shard was removed; run again to make it anew, and check the "
            "disk if this repeats."
        ) from None
    # A manifest says that the output is whole; from here on it speaks of an earlier one.
    (outputs.workspace.checkpoint / MANIFEST_NAME).unlink(missing_ok=True)
    partial.publish(shard, outputs.workspace.checkpoint)
    record = _shard_record(outputs, shard, partial.done, reusable, digest, tensors)
    record.save(outputs.record_path(shard))
    return record


def _shard_record(
    outputs: Outputs,
    shard: int,
    entries: Mapping[str, Entry],
    reusable: Reusables,
    digest: FileDigest,
    tensors: dict[str, str],
) -> ShardRecord:
    weights = outputs.weights_of[shard]
    return ShardRecord(
        fingerprint=outputs.fingerprint(shard),
        outputs=[digest],
        inputs=outputs.inputs[shard],
        tensors=tensors,
        sources=_source_digests(outputs, shard, entries, reusable),
        keys={p.weight.name: outputs.keys[p.weight.name] for p in weights},
        fidelity=_fidelity(outputs, shard, entries, reusable),
    )


def _source_digests(
    outputs: Outputs, shard: int, entries: Mapping[str, Entry], reusable: Reusables
) -> dict[str, list[str]]:
    """Return the digests of the source blocks behind an output, read now or long ago."""
    digests: dict[str, list[str]] = {}
    for planned in outputs.weights_of[shard]:
        sources = {segment.source for segment in planned.weight.segments}
        for tensor in reusable.get(planned.weight.name, {}).values():
            digests |= {s: d for s, d in tensor.record.sources.items() if s in sources}
    read: dict[str, list[str]] = defaultdict(list)
    for job in outputs.jobs_of[shard]:
        if entry := entries.get(job.key):
            read[job.source].append(entry.source_sha256)
    digests |= read
    # In the order of the jobs, so that the manifest does not depend on which were copied.
    return {job.source: digests[job.source] for job in outputs.jobs_of[shard]}


def _fidelity(
    outputs: Outputs, shard: int, entries: Mapping[str, Entry], reusable: Reusables
) -> dict[str, Fidelity]:
    """Return how near the codes of each quantized weight of an output are to it."""
    fidelity: dict[str, Fidelity] = {}
    for planned in outputs.weights_of[shard]:
        name = planned.weight.name
        for tensor in reusable.get(name, {}).values():
            if name in tensor.record.fidelity:
                fidelity[name] = tensor.record.fidelity[name]
    for job in outputs.jobs_of[shard]:
        entry = entries.get(job.key)
        for target in job.targets if entry else ():
            name = target.weight.weight.name
            if entry and name in entry.fidelity and name not in reusable:
                block = entry.fidelity[name]
                fidelity[name] = fidelity[name] + block if name in fidelity else block
    return fidelity
