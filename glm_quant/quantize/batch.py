"""One pass over the outputs that are still to be made: what is left to do, and how it is done."""

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import replace

from glm_quant.artifact import FileDigest
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.codes.fidelity import Fidelity
from glm_quant.errors import IntegrityError
from glm_quant.quantize.journal import Entry, Piece
from glm_quant.quantize.ledger import Ledger
from glm_quant.quantize.partial import PartialOutputs
from glm_quant.quantize.pipeline import Pipeline, Progress, Step, Task
from glm_quant.quantize.records import ShardRecord
from glm_quant.quantize.reuse import Donor, copied
from glm_quant.quantize.worker import Worker


class Batch:
    """Output shards being made. Close it, whatever happens."""

    def __init__(
        self,
        ledger: Ledger,
        unfinished: list[int],
        wanted: list[int],
        donors: Mapping[str, Mapping[str, Donor]],
        workers: int,
    ) -> None:
        """Find out what is left to do, and begin.

        Args:
            ledger: the plan and its records.
            unfinished: outputs that are to be made; what is at hand is done for all of them.
            wanted: those that are brought to completion, in this order.
            donors: for each weight that need not be made, where its tensors are, by name.
            workers: threads that encode.
        """
        self._ledger = ledger
        self._unfinished = set(unfinished)
        self._donors = donors
        self._broken: int | None = None
        # Of the layout: what is calibrated is in each job's own key.
        self._outputs = PartialOutputs(
            ledger.workspace.partial, ledger.plan.shards, ledger.whole_layout
        )
        for shard in unfinished:
            self._outputs.take_back(shard, ledger.workspace.checkpoint)
            if not self._outputs.is_intact(shard):
                self._forget(shard)
        finished = (
            record
            for shard in range(len(ledger.plan.shards))
            if shard not in self._unfinished and (record := ledger.finished(shard))
        )
        self._worker = Worker(ledger, self._outputs, finished)
        self._tasks = self._left_to_do()
        source = ledger.checkpoint.source
        self._pipeline = Pipeline(
            source,
            self._outputs,
            self._steps(wanted),
            {
                shard: {key for key, task in self._tasks.items() if shard in task.shards}
                for shard in wanted
            },
            self._finish,
            ledger.workspace.root,
        )
        every = [*wanted, *(i for i in unfinished if i not in wanted)]
        source.expect([name for name, _ in self._needs(every) if name])
        self._pipeline.start(workers)

    def brings(self, shard: int) -> bool:
        """Whether this output is brought to completion here."""
        return shard in self._pipeline.outputs

    def wait(self, shard: int, progress: Progress | None) -> ShardRecord:
        """Return an output's record as soon as it is finished; see `Pipeline.wait`."""
        return self._pipeline.wait(shard, progress)

    def close(self) -> None:
        """End all work; what was encoded is kept, but for an output that is broken."""
        try:
            self._pipeline.stop()
            if self._broken is not None:
                self._outputs.flush()
                self._forget(self._broken)
        finally:
            self._outputs.close()

    def _forget(self, shard: int) -> None:
        self._outputs.forget(shard, {job.key for job in self._ledger.jobs_of[shard]})

    def _left_to_do(self) -> dict[str, Task]:
        """Return what is not journaled yet, by key; what the journal says in vain is dropped."""
        ledger, done = self._ledger, self._outputs.done
        tasks: dict[str, Task] = {}
        for job in ledger.jobs:
            targets = tuple(t for t in job.targets if t.weight.weight.name not in self._donors)
            shards = job.shards & self._unfinished
            if targets and shards:
                task = self._worker.task(replace(job, targets=targets), self._unfinished)
                tasks[job.key] = task
        for tensors in self._donors.values():
            for donor in tensors.values():
                if donor.target.shard in self._unfinished:
                    tasks[_copy_key(donor)] = self._copy_task(donor)
        self._outputs.keep_only(self._unfinished, tasks.keys())
        return {key: task for key, task in tasks.items() if key not in done}

    def _copy_task(self, donor: Donor) -> Task:
        target = donor.target
        return Task(
            _copy_key(donor),
            frozenset({target.shard}),
            target.size_bytes,
            None,
            lambda _: self._copy(donor),
        )

    def _steps(self, wanted: list[int]) -> list[Step]:
        """Return what the wanted outputs need, and whatever else their source shards allow."""
        by_source: dict[str | None, list[Task]] = defaultdict(list)
        for task in self._tasks.values():
            by_source[task.source].append(task)
        steps: list[Step] = []
        for source, copies in self._needs(wanted):
            steps.append(Step(source, by_source[source] if source else copies))
        return steps

    def _needs(self, outputs: list[int]) -> Iterator[tuple[str | None, list[Task]]]:
        """Yield each source shard that outputs need, once; and what they need besides."""
        tasks_of: dict[int, list[Task]] = defaultdict(list)
        for task in self._tasks.values():
            for shard in task.shards:
                tasks_of[shard].append(task)
        taken: set[str] = set()
        for shard in outputs:
            copies = [task for task in tasks_of[shard] if task.source is None]
            if copies:
                yield None, copies
            needed = {task.source for task in tasks_of[shard] if task.source} - taken
            taken |= needed
            yield from ((source, []) for source in sorted(needed))

    def _copy(self, donor: Donor) -> Entry:
        """Copy a tensor that was made before. Runs in an encoder.

        Raises:
            IntegrityError: its bytes are not those that were recorded.
        """
        digest = hashlib.sha256()
        pieces: list[Piece] = []
        for first_row, data in copied(donor):
            digest.update(data.data)
            pieces.append(self._outputs.write(donor.target, first_row, data))
        if digest.hexdigest() != donor.sha256:
            raise IntegrityError(
                f"{donor.path}: tensor {donor.target.name} has sha256 {digest.hexdigest()}, the "
                f"record says {donor.sha256}. The file changed after it was made; delete it and "
                "run again, and the tensor is made from the source."
            )
        return Entry(_copy_key(donor), digest.hexdigest(), tuple(pieces))

    def _finish(self, shard: int, full: bool) -> ShardRecord | None:
        """Check what there is of an output; publish it if it is full. Runs in the finisher."""
        try:
            if full:
                return self._publish(shard, *self._outputs.check(shard))
            self._outputs.check_ahead(shard)
        except IntegrityError as error:
            self._broken = shard
            raise IntegrityError(
                f"{error} The partial shard was removed; run again to make it anew, and check the "
                "disk if this repeats."
            ) from None
        return None

    def _publish(self, shard: int, digest: FileDigest, tensors: dict[str, str]) -> ShardRecord:
        """Give a checked output its final name, and record it."""
        ledger = self._ledger
        # A manifest says that the output is whole; from here on it speaks of an earlier one.
        (ledger.workspace.checkpoint / MANIFEST_NAME).unlink(missing_ok=True)
        self._outputs.publish(shard, ledger.workspace.checkpoint)
        record = ShardRecord(
            fingerprint=ledger.fingerprint(shard),
            outputs=[digest],
            inputs=ledger.inputs[shard],
            tensors=tensors,
            sources=self._sources_of(shard),
            keys={p.weight.name: ledger.keys[p.weight.name] for p in ledger.weights_of[shard]},
            fidelity=self._fidelity_of(shard),
        )
        record.save(ledger.record_path(shard))
        return record

    def _sources_of(self, shard: int) -> dict[str, list[str]]:
        """Return the digests of the source blocks behind an output, read now or long ago."""
        found: dict[str, list[str]] = {}
        for planned in self._ledger.weights_of[shard]:
            for donor in self._donors.get(planned.weight.name, {}).values():
                parts = {part.source for part in planned.weight.parts}
                found |= {s: d for s, d in donor.record.sources.items() if s in parts}
        read: dict[str, list[str]] = defaultdict(list)
        for job in self._ledger.jobs_of[shard]:
            if entry := self._outputs.done.get(job.key):
                read[job.source].append(entry.source_sha256)
        return {job.source: (found | read)[job.source] for job in self._ledger.jobs_of[shard]}

    def _fidelity_of(self, shard: int) -> dict[str, Fidelity]:
        found: dict[str, Fidelity] = {}
        for planned in self._ledger.weights_of[shard]:
            name = planned.weight.name
            for donor in self._donors.get(name, {}).values():
                if name in donor.record.fidelity:
                    found[name] = donor.record.fidelity[name]
        for job in self._ledger.jobs_of[shard]:
            for target in job.targets:
                name = target.weight.weight.name
                entry = self._outputs.done.get(job.key)
                if entry and name in entry.fidelity and name not in self._donors:
                    so_far = found.get(name)
                    made = entry.fidelity[name]
                    found[name] = so_far + made if so_far else made
        return found


def _copy_key(donor: Donor) -> str:
    return f"copy:{donor.target.name}:{donor.sha256[:16]}"
