"""Shards that left this disk, fetched back for the stages that need the whole build."""

import logging
from pathlib import Path

from glm_quant.artifact import FileDigest, Record, copy_atomic, publish_file, require_space
from glm_quant.build import Build
from glm_quant.checkpoint.source import Source
from glm_quant.errors import PublishError, SourceError
from glm_quant.fingerprint import Canonical
from glm_quant.hub.target import Target
from glm_quant.quantize.convert import Progress, RemoteShard
from glm_quant.stages.base import Stage, shard_title
from glm_quant.stages.upload import build_id, early_targets

_log = logging.getLogger(__name__)


def elsewhere(build: Build) -> list[int]:
    """Return the numbers of the finished shards that are not on this disk."""
    folder = build.workspace.checkpoint
    return [
        i
        for i, shard in enumerate(build.plan.shards)
        if not (folder / shard.name).exists() and build.conversion.outputs.finished(i) is not None
    ]


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
    def title(self) -> str:
        """Which part this is: fetch back 03 of 46."""
        return f"fetch back {shard_title(self.build, self.shard)}"

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
