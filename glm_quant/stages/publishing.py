"""The stages that bring a build to people: upload (a shard ahead), restore, publish.

While the conversion goes on, finished shards go to each target, out of sight. With
`publish.keep_local: false` a shard leaves this disk when every target has proved that it is there;
what needs the whole build later fetches it back.
"""

import logging
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from glm_quant.artifact import FileDigest, Record, copy_atomic, publish_file, require_space
from glm_quant.build import Build
from glm_quant.checkpoint.source import Source
from glm_quant.errors import PublishError, SourceError
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.hub.retry import Patience
from glm_quant.hub.target import Diff, Target, compare
from glm_quant.quantize.convert import Progress, RemoteShard, ShardRecord
from glm_quant.stages.base import Stage, StageResult
from glm_quant.stages.gates import publishable_files
from glm_quant.stages.making import AssembleStage
from glm_quant.stages.releasing import CardStage

_log = logging.getLogger(__name__)

# For a question whose answer only saves work.
_QUICK = Patience(tries=2)


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
    if build.lets_go:
        return build.targets
    return tuple(target for target in build.targets if not is_folder(target))


def elsewhere(build: Build) -> list[int]:
    """Return the numbers of the finished shards that are not on this disk."""
    folder = build.workspace.checkpoint
    return [
        i
        for i, shard in enumerate(build.plan.shards)
        if not (folder / shard.name).exists() and build.conversion.outputs.finished(i) is not None
    ]


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
        if self.build.lets_go:
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
    if not build.lets_go or not targets or AssembleStage(build).current():
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
    if build.recipe.records is None:
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


class RestoreRecord(Record):
    """A shard that was fetched back."""


class RestoreStage(Stage[RestoreRecord]):
    """One output shard back on this disk, for the stages that need the whole build."""

    name = "restore"
    record_type = RestoreRecord

    def __init__(self, build: Build, shard: int) -> None:
        """Attach to an output shard of a build."""
        super().__init__(build)
        self.shard = shard

    @property
    def record_path(self) -> Path:
        """Where the record stands: one a shard."""
        name = self.build.plan.shards[self.shard].name
        return self.build.workspace.records / "restored" / f"{name}.json"

    @property
    def root(self) -> Path:
        """The checkpoint folder."""
        return self.build.workspace.checkpoint

    def inputs(self) -> Canonical:
        """Return the shard."""
        return {"shard": self.build.conversion.outputs.fingerprint(self.shard)}

    def make(self, progress: Progress) -> RestoreRecord:
        """Fetch the shard from the first target that has it.

        Raises:
            DiskSpaceError: the whole build does not fit on this disk.
            PublishError: no target has the shard any more; it will be made again.
        """
        missing = sum(self.build.plan.shards[i].size_bytes for i in elsewhere(self.build))
        require_space(
            self.root,
            missing,
            "fetching the build back for parity and evaluation (every shard is safe at its "
            "targets; on a machine with more room, go on with a copy of this workspace)",
        )
        name = self.build.plan.shards[self.shard].name
        mark = self.build.conversion.outputs.remote_record_path(name)
        kept = RemoteShard.load(mark)
        for target in early_targets(self.build) if kept else ():
            if kept and self._fetch(target, kept.outputs[0]):
                progress(1, 1)
                return RestoreRecord(fingerprint=self.fingerprint(), outputs=kept.outputs)
        mark.unlink(missing_ok=True)
        raise PublishError(
            f"{mark.name.removesuffix('.elsewhere.json')}: the shard was uploaded and its local "
            "copy deleted, and no target has it any more. Run again: it is made anew."
        )

    def summarize(self, record: RestoreRecord) -> str:
        """Return the file's name and size."""
        file = record.outputs[0]
        return f"{file.path}: {file.size_bytes / 1e6:,.1f} MB fetched back"

    def _fetch(self, target: str, file: FileDigest) -> bool:
        """Fetch from one target; False where it does not have the shard as it was recorded."""
        try:
            source = self._staged(self.build.open_target(target, build_id(self.build)))
            found = source.files().get(file.path)
            if found is None or found.size_bytes != file.size_bytes:
                return False
            path = source.acquire(file.path)
        except SourceError as error:
            _log.warning("%s: %s", target, error)
            return False
        fetched = FileDigest.of(path.parent, path.name)
        if fetched.sha256 == file.sha256:
            self._take(path, file)
        source.expect(())
        source.release(file.path)
        return fetched.sha256 == file.sha256

    def _staged(self, target: Target) -> Source:
        return target.staged(self.build.workspace.scratch / "restore")

    def _take(self, path: Path, file: FileDigest) -> None:
        """Give the fetched file its name in the checkpoint; a target's own file is copied."""
        if path.is_relative_to(self.build.workspace.scratch):
            publish_file(path, self.root / file.path)
        else:
            copy_atomic(path, self.root / file.path)


class PublishRecord(Record):
    """A published build.

    Attributes:
        target: its address as the recipe or the command gave it.
        revision: the target's own name of what was published; empty for a folder.
        url: where a person finds it.
        contents: every file of it. A folder's are outputs too, an elsewhere's are asked for.
        change: what the last act changed, in words.
    """

    target: str
    revision: str
    url: str
    contents: list[FileDigest]
    change: str


class PublishStage(Stage[PublishRecord]):
    """The verified build and its card, at one target, all at once."""

    name = "publish"
    record_type = PublishRecord

    def __init__(self, build: Build, target: str) -> None:
        """Attach to a build and a target."""
        super().__init__(build)
        self.target = target

    @property
    def record_path(self) -> Path:
        """Where the record stands: one a target."""
        return self.build.workspace.records / f"publish-{fingerprint(self.target)[:12]}.json"

    @property
    def root(self) -> Path:
        """The target folder, where it is one."""
        return Path(self.target.removeprefix("file://")).expanduser().absolute()

    def inputs(self) -> Canonical:
        """Return the card, which depends on all that came before, and the target."""
        return {"card": CardStage(self.build).fingerprint(), "target": self.target}

    def is_whole(self, record: PublishRecord) -> bool:
        """Whether the target still shows the build: a folder is looked at, any other is asked."""
        if is_folder(self.target):
            return record.is_whole(self.root)
        try:
            target = self.build.open_target(self.target, build_id(self.build), patience=_QUICK)
            there = target.visible().files
        except PublishError:
            return False
        return compare(self.build.workspace.checkpoint, record.contents, there).is_empty

    def make(self, progress: Progress) -> PublishRecord:
        """Check what must be true, verify every byte once more, then publish.

        Raises:
            IntegrityError: the build is not what was recorded.
            PublishError: it may not be published, or the target refuses.
        """
        files = publishable_files(self.build)
        target = self.build.open_target(self.target, build_id(self.build))
        published = target.publish(self.build.workspace.checkpoint, files)
        progress(1, 1)
        return PublishRecord(
            fingerprint=self.fingerprint(),
            outputs=files if is_folder(self.target) else [],
            target=self.target,
            revision=published.revision,
            url=published.url,
            contents=files,
            change=published.diff.describe(),
        )

    def diff(self) -> Diff:
        """Return what publishing would change, after the same checks; nothing is written.

        Raises:
            IntegrityError: the build is not what was recorded.
            PublishError: it may not be published, or the target cannot be reached.
        """
        files = publishable_files(self.build)
        there = self.build.open_target(self.target, build_id(self.build)).visible().files
        return compare(self.build.workspace.checkpoint, files, there)

    def leftovers(self) -> tuple[str, ...]:
        """Return what builds that were given up left at the target; publishing deletes it.

        Raises:
            PublishError: the target cannot be reached.
        """
        return self.build.open_target(self.target, build_id(self.build)).leftovers()

    def summarize(self, record: PublishRecord) -> str:
        """Return where it is, and what changed there."""
        where = record.target if is_folder(record.target) else record.url
        return f"{len(record.contents)} files at {where}: {record.change}"
