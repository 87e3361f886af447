"""Publishing to a folder: the whole build appears under its name at once, or not at all.

Weights are hard-linked where target and workspace share a disk (nothing of ours ever writes into a
finished file, so both names stay right) and copied elsewhere. What is uploaded ahead waits in a
hidden folder beside the target.
"""

import ctypes
import errno
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from glm_quant.artifact import FileDigest, copy_atomic, full_disk_named, sha256_file, sync_folder
from glm_quant.checkpoint.manifest import MANIFEST_NAME, load_manifest
from glm_quant.checkpoint.source import FolderSource, Source, SourceFile
from glm_quant.errors import CheckpointError, PublishError
from glm_quant.hub.target import Listing, Published, compare, may_be_stale
from glm_quant.litter import entries, files_below

_CARD_NAME = "README.md"
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2  # linux/fs.h; macOS calls the same RENAME_SWAP (sys/stdio.h)


class FolderTarget:
    """A folder on a disk of this machine, or one that is mounted."""

    def __init__(self, folder: Path, build_id: str) -> None:
        """Prepare; nothing is touched yet."""
        self._folder = folder.expanduser().absolute()
        place = self._folder.resolve()
        self._place = place
        self._prefix = f".{place.name}."
        self._fresh = place.with_name(f"{self._prefix}{build_id}.new")

    @property
    def uri(self) -> str:
        """The folder's path."""
        return str(self._folder)

    def visible(self) -> Listing:
        """Return the folder's files: weights by its own manifest, the rest hashed."""
        found: dict[str, SourceFile] = {}
        if self._place.is_dir():
            told = _told(self._place)
            for path in files_below(self._place):
                name = str(path.relative_to(self._place))
                file = told.get(name)
                if file is None or not file.is_there(self._place):
                    file = FileDigest.of(self._place, name)
                identity = f"sha256:{file.sha256}"
                found[name] = SourceFile(name, file.size_bytes, identity, file.sha256)
        return Listing("", found)

    def judge(self, folder: Path) -> None:
        """Refuse what is in the way, and write a file without a name beside the target."""
        self._refuse(folder)
        parent = next(path for path in self._place.parents if path.exists())
        try:
            with tempfile.TemporaryFile(dir=parent):
                pass
        except OSError as error:
            raise PublishError(
                f"{self._place}: nothing can be written in {parent} ({error.strerror}). Choose a "
                "folder of yours on a disk that can be written, or change its permissions."
            ) from None

    def upload(self, folder: Path, file: FileDigest) -> None:
        """Link or copy a file into the hidden folder."""
        self._refuse(folder)
        source, staged = folder / file.path, self._fresh / file.path
        if file.is_there(self._fresh) and (
            (source.exists() and staged.samefile(source)) or sha256_file(staged) == file.sha256
        ):
            return
        if not source.is_file():
            raise PublishError(
                f"{source}: the shard is neither here nor in {self._fresh}. Run the conversion "
                "again: it makes what is missing."
            )
        staged.unlink(missing_ok=True)
        staged.parent.mkdir(parents=True, exist_ok=True)
        with full_disk_named(staged.parent):
            if not _link_or_copy(source, staged):
                file.check(self._fresh)

    def publish(self, folder: Path, files: Sequence[FileDigest]) -> Published:
        """Exchange the hidden folder for the one that people see.

        An earlier build of ours is replaced; what else lies there stays. Where the system cannot
        exchange two folders, the earlier one is moved aside first: for a moment there is none.
        """
        self._refuse(folder)
        diff = compare(folder, files, self.visible().files)
        for file in files:
            self.upload(folder, file)
        wanted = {file.path for file in files}
        for path in files_below(self._fresh):
            if str(path.relative_to(self._fresh)) not in wanted:
                path.unlink()
        self._keep_foreign_files(wanted)
        sync_folder(self._fresh)
        old = self._place.with_name(f"{self._prefix}old")
        if old.exists():
            shutil.rmtree(old)
        if not self._place.exists():
            self._fresh.rename(self._place)
        elif exchange(self._fresh, self._place):
            self._fresh.rename(old)
        else:
            self._place.rename(old)
            self._fresh.rename(self._place)
        sync_folder(self._place.parent)
        if old.exists():
            shutil.rmtree(old)
        return Published("", self.uri, diff)

    def staged(self, cache: Path) -> Source:  # noqa: ARG002 - local files need none
        """Return the hidden folder, or the published one."""
        return FolderSource(self._fresh if self._fresh.exists() else self._place)

    def _keep_foreign_files(self, wanted: set[str]) -> None:
        """Bring what no build of ours made to the folder that will take this one's name."""
        for name in self._foreign_names() - wanted:
            kept = self._fresh / name
            kept.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(self._place / name, kept)
            except OSError:  # a system without links, or a file that may not have any
                copy_atomic(self._place / name, kept)

    def _foreign_names(self) -> set[str]:
        names = {str(path.relative_to(self._place)) for path in files_below(self._place)}
        return {name for name in names if name != _CARD_NAME and not may_be_stale(name)}

    def _refuse(self, build: Path) -> None:
        if self._place.is_relative_to(build.resolve()):
            raise PublishError(
                f"{self._place}: it is the build {build} itself or lies inside it. Choose another "
                "folder."
            )
        if not self._place.exists():
            return
        if not self._place.is_dir():
            raise PublishError(f"{self._place}: this is a file. Choose a folder to publish to.")
        if self._place.is_mount():
            raise PublishError(
                f"{self._place}: this is the top of a disk of its own, which nothing can replace. "
                f"Choose a folder on that disk, such as {self._place / 'published'}."
            )
        strangers = entries(self._place)
        if strangers and not (self._place / MANIFEST_NAME).is_file():
            raise PublishError(
                f"{self._place}: it holds something that is no build of glm-quant "
                f"({strangers[0].name}). Choose a folder that does not exist yet, or remove it."
            )
        for name in sorted(self._foreign_names()):
            if name.endswith(".safetensors") and "/" not in name:
                raise PublishError(
                    f"{self._place / name}: it is no shard of a build, and loaders would read it "
                    "with the build's. Move it elsewhere."
                )


def exchange(one: Path, other: Path) -> bool:
    """Give two folders each other's name in one step; False where the system cannot."""
    library = ctypes.CDLL(None, use_errno=True)
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "darwin" and hasattr(library, "renamex_np"):
        return library.renamex_np(names[0], names[1], _RENAME_EXCHANGE) == 0
    if hasattr(library, "renameat2"):
        done = library.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE)
        return done == 0
    return False


def _told(folder: Path) -> dict[str, FileDigest]:
    try:
        return {shard.file.path: shard.file for shard in load_manifest(folder).shards}
    except CheckpointError:
        return {}


def _link_or_copy(source: Path, target: Path) -> bool:
    """Bring a file there; returns whether both names are the same file."""
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
        else:
            return True
    copy_atomic(source, target)
    return False
