"""Finished shards at the targets, out of sight, while the conversion goes on.

With `publish.keep_local: false` a shard leaves this disk when every target has proved that it is
there; what needs the whole build later fetches it back.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from glm_quant.artifact import FileDigest, Record
from glm_quant.build import Build
from glm_quant.errors import PublishError
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.quantize.convert import Progress, RemoteShard, ShardRecord
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.base import Stage, StageResult, shard_title

_log = logging.getLogger(__name__)


def build_id(build: Build) -> str:
    """Return what a build is called where it waits out of sight."""
    return AssembleStage(build).fingerprint()[:12]


def is_folder(target: str) -> bool:
    """Whether a target is a folder of this machine."""
    return "://" not in target or target.startswith("file://")


def early_targets(build: Build) -> tuple[str, ...]:
    """Return the targets that get shards while the conversion goes on.

    A folder gets links, which cost nothing at the end either.
    """
    if build.evicts_shards:
        return build.targets
    return tuple(target for target in build.targets if not is_folder(target))


class UploadRecord(Record):
    """A shard that a target has, proved by the target's own digest."""

    target: str
    file: FileDigest


class UploadStage(Stage[UploadRecord]):
    """One output shard at one target, out of sight."""

    name = "upload"
    record_type = UploadRecord
    tells_failure = False

    def __init__(self, build: Build, shard: int, target: str) -> None:
        """Attach to an output shard of a build and a target."""
        super().__init__(build)
        self.shard, self.target = shard, target

    @property
    def title(self) -> str:
        """Which part this is: upload 03 of 46 to hf://org/name."""
        return f"upload {shard_title(self.build, self.shard)} to {self.target}"

    @property
    def record_path(self) -> Path:
        """Where the record stands: one a target and shard."""
        folder = self.build.workspace.records / "uploads" / fingerprint(self.target)[:12]
        return folder / f"{self.build.plan.shards[self.shard].name}.json"

    def inputs(self) -> Canonical:
        """Return the shard, the target, and where in it."""
        return {
            "shard": self.build.conversion.outputs.fingerprint(self.shard),
            "target": self.target,
            "build": build_id(self.build),
        }

    def run(self, progress: Progress) -> StageResult:
        """Upload, then let the local copy go if the recipe says so and every target has it."""
        result = super().run(progress)
        if self.build.evicts_shards:
            let_go(self.build, [self.shard])
        return result

    def make(self, progress: Progress) -> UploadRecord:
        """Upload.

        Raises:
            PublishError: the target refuses or cannot be reached, or the shard is not finished.
            IntegrityError: the file is not what was recorded.
        """
        file = self._finished().outputs[0]
        target = self.build.open_target(self.target, build_id(self.build))
        target.upload(self.build.workspace.checkpoint, file)
        progress(1, 1)
        return UploadRecord(fingerprint=self.fingerprint(), target=self.target, file=file)

    def summarize(self, record: UploadRecord) -> str:
        """Return the file and where it is."""
        return f"{record.file.path}: {record.file.size_bytes / 1e6:,.1f} MB at {record.target}"

    def _finished(self) -> ShardRecord:
        record = self.build.conversion.outputs.finished(self.shard)
        if record is None:
            name = self.build.plan.shards[self.shard].name
            raise PublishError(f"{name}: the shard is not finished; run again.")
        return record


def is_here(build: Build, shard: int) -> bool:
    """Whether a shard's file is on this disk."""
    return (build.workspace.checkpoint / build.plan.shards[shard].name).is_file()


def let_go(build: Build, shards: Iterable[int], failed: Collection[str] = ()) -> None:
    """Delete those of the finished shards that are safe at targets, where the recipe says so.

    That is at every target that has not failed, and at one at least: a target that is away gets
    them when the build is published, after it was fetched back. A whole build stays as it is.
    """
    targets = [target for target in early_targets(build) if target not in failed]
    if not build.evicts_shards or not targets or AssembleStage(build).current():
        return
    for shard in shards:
        record = build.conversion.outputs.finished(shard) if is_here(build, shard) else None
        if record and all(UploadStage(build, shard, target).current() for target in targets):
            file = record.outputs[0]
            _note_elsewhere(build, record, targets[0])
            (build.workspace.checkpoint / file.path).unlink(missing_ok=True)
            _log.info("%s: %s, the local copy was deleted", file.path, _have(targets))


def _have(targets: Sequence[str]) -> str:
    return f"{' and '.join(targets)} {'has' if len(targets) == 1 else 'have'} it"


def take_over(build: Build) -> None:
    """Count finished shards that are at a target as kept, where the records came from elsewhere.

    What another machine recorded of a folder speaks of its disk, not of this one.
    """
    if not build.shares_records:
        return
    for i in range(len(build.plan.shards)):
        record = ShardRecord.load(build.conversion.outputs.record_path(i))
        if record is None or record.fingerprint != build.conversion.outputs.fingerprint(i):
            continue
        file = record.outputs[0]
        if build.conversion.outputs.is_kept(file):
            continue
        for target in build.targets:
            upload = UploadStage(build, i, target)
            if is_folder(target):
                upload.record_path.unlink(missing_ok=True)
                continue
            there = upload.current()
            if there is not None and there.file == file:
                _note_elsewhere(build, record, target)


def _note_elsewhere(build: Build, record: ShardRecord, target: str) -> None:
    """Record that a finished shard is at a target, so that it need not be here."""
    file = record.outputs[0]
    mark = RemoteShard(fingerprint=record.fingerprint, outputs=[file], target=target)
    mark.save(build.conversion.outputs.remote_record_path(file.path))
