"""Where a checkpoint comes from: one interface for a folder, the Hub and S3.

`identity` is what a fingerprint may rely on without reading gigabytes: the sha256 that a Hub
publishes, or for a folder the file's size and time of change (as make and rsync do). Content
digests of a folder's tensors are taken while they stream through and stand in the manifest.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from glm_quant.errors import SourceError
from glm_quant.litter import entries


@dataclass(frozen=True)
class SourceFile:
    """One file of a source. `sha256` is what the source promises, if it promises anything."""

    name: str
    size_bytes: int
    identity: str
    sha256: str | None = None


class Source(Protocol):
    """What a conversion needs of the place that holds a checkpoint."""

    @property
    def uri(self) -> str:
        """Where it is, with the pinned revision if there is one."""
        ...

    @property
    def places(self) -> int | None:
        """How many files may be acquired and not released at a time; None for any number."""
        ...

    def files(self) -> Mapping[str, SourceFile]:
        """All files by name."""
        ...

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return bytes `begin` to `end` (default: the end) of a file."""
        ...

    def expect(self, names: Sequence[str]) -> None:
        """Say which files will be acquired, in this order, so that they can be fetched ahead.

        It replaces what was said before, and what was acquired before is in use no more. No names
        at all: fetch nothing more, and let nobody wait in `acquire`, which may be in another
        thread.
        """
        ...

    def acquire(self, name: str) -> Path:
        """Return a local path of a whole file, fetching it first where that is needed."""
        ...

    def release(self, name: str) -> None:
        """Say that the local copy of a file is needed no more."""
        ...

    def allow(self, places: int) -> None:
        """Let so many files be acquired at a time from now on, where there is a bound."""
        ...


class FolderSource:
    """A checkpoint in a local folder: nothing is copied and nothing is ever deleted."""

    def __init__(self, folder: Path) -> None:
        """Open a folder.

        Raises:
            SourceError: it does not exist.
        """
        if not folder.is_dir():
            raise SourceError(
                f"{folder}: there is no such folder. Give --source a folder with config.json and "
                "*.safetensors files."
            )
        self._folder = folder.resolve()

    @property
    def uri(self) -> str:
        """The folder's path."""
        return str(self._folder)

    @property
    def places(self) -> int | None:
        """Any number."""
        return None

    def files(self) -> Mapping[str, SourceFile]:
        """All plain files of the folder by name (subfolders are not part of a checkpoint)."""
        files: dict[str, SourceFile] = {}
        for path in entries(self._folder):
            if path.is_file() and not path.name.startswith("."):
                stat = path.stat()
                identity = f"stat:{stat.st_size}:{stat.st_mtime_ns}"
                files[path.name] = SourceFile(path.name, stat.st_size, identity)
        return files

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return bytes of a file of the folder."""
        with self.acquire(name).open("rb") as file:
            file.seek(begin)
            return file.read(-1 if end is None else max(0, end - begin))

    def expect(self, names: Sequence[str]) -> None:
        """Do nothing: everything is here."""

    def acquire(self, name: str) -> Path:
        """Return the file's own path.

        Raises:
            SourceError: the file is not there.
        """
        path = self._folder / name
        if path.parent != self._folder or not path.is_file():
            raise SourceError(f"{path}: the file is missing from the checkpoint; fetch it again.")
        return path

    def release(self, name: str) -> None:
        """Do nothing: the folder is the user's own."""

    def allow(self, places: int) -> None:
        """Do nothing: there is no bound."""
