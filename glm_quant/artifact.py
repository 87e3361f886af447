"""Files that are either whole or absent, and the records beside them.

Order matters: bytes to a temporary name, fsync, rename, and the record last. A record's existence
is the completion mark, so a crash at any moment leaves either the old state or the new one. On
macOS only `F_FULLFSYNC` reaches the platter; plain fsync there stops at the drive's cache.
"""

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

from glm_quant.errors import DiskSpaceError, GlmQuantError, IntegrityError, OutputError

_BLOCK = 8 << 20
# What a file is called until it is whole: see `_temporary`.
TEMPORARY_NAME = re.compile(r"\..+\.\d+\.part")
_SEAL = re.compile(rb',\n  "seal": "([0-9a-f]{64})"\n}\n\Z')


class FileDigest(BaseModel):
    """A file inside some root: relative path, size in bytes, sha256 of its content."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    path: str
    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, root: Path, path: str) -> Self:
        """Measure the file `root / path` (reads all of it)."""
        file = root / path
        return cls(path=path, size_bytes=file.stat().st_size, sha256=sha256_file(file))

    def is_there(self, root: Path) -> bool:
        """Whether the file exists with the recorded size: cheap, does not read it."""
        file = root / self.path
        return file.is_file() and file.stat().st_size == self.size_bytes

    def check(self, root: Path) -> None:
        """Read the file and compare.

        Raises:
            IntegrityError: it is missing, or its size or sha256 differs.
        """
        file = root / self.path
        if not file.is_file():
            raise IntegrityError(f"{file}: the file is missing; run again to rebuild it.")
        size = file.stat().st_size
        if size != self.size_bytes:
            raise IntegrityError(
                f"{file}: the record says {self.size_bytes:,} bytes, the file has {size:,}. "
                "Delete the file and run again."
            )
        found = sha256_file(file)
        if found != self.sha256:
            raise IntegrityError(
                f"{file}: the record says sha256 {self.sha256}, the file has {found}. "
                "The bytes changed after they were written; delete the file and run again."
            )


class Record(BaseModel):
    """What a stage leaves behind: which inputs it saw, what it made, what it measured.

    Attributes:
        fingerprint: hash of everything that decides the outputs.
        outputs: the files that this stage made, relative to the record's root.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    outputs: list[FileDigest] = []

    def is_whole(self, root: Path) -> bool:
        """Whether every output stands on disk with its recorded size."""
        return all(output.is_there(root) for output in self.outputs)

    def save(self, path: Path) -> None:
        """Write the record, sealed; call it after the outputs are durable."""
        write_atomic(path, seal(self.model_dump_json(indent=2)))

    @classmethod
    def load(cls, path: Path) -> Self | None:
        """Read a record; None when absent or damaged, since then the work is simply redone."""
        try:
            return cls.model_validate_json(unseal(path.read_bytes(), path))
        except (FileNotFoundError, IntegrityError, ValidationError):
            return None


def seal(text: str) -> bytes:
    """Return a JSON object with the sha256 of its own text as last key.

    A flipped bit in a digest or a measured number leaves good JSON; this tells it.
    """
    if not text.endswith("\n}"):
        raise ValueError("a sealed JSON object is indented and not empty")
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f'{text[:-2]},\n  "seal": "{digest}"\n}}\n'.encode()


def unseal(data: bytes, path: Path) -> bytes:
    """Return the JSON object that was sealed.

    Args:
        data: what `seal` returned.
        path: where it was read, for the message.

    Raises:
        IntegrityError: it has no seal, or is not what was sealed.
    """
    found = _SEAL.search(data)
    text = data[: found.start()] + b"\n}" if found else b""
    digest = hashlib.sha256(text).hexdigest()
    if found is None or found[1].decode() != digest:
        raise IntegrityError(
            f"{path}: its seal says sha256 {found[1].decode() if found else '(nothing)'}, its text "
            f"has {digest}. It was changed or cut after it was written; make or fetch it again."
        )
    return text


def sha256_file(path: Path) -> str:
    """Return the hex sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_file(descriptor: int) -> None:
    """Force a file's bytes to the medium."""
    if sys.platform == "darwin":
        import fcntl

        fcntl.fcntl(descriptor, fcntl.F_FULLFSYNC)
    else:
        os.fsync(descriptor)


def sync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, data: bytes) -> None:
    """Write a small file so that `path` never shows anything but whole content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        sync_file(file.fileno())
    publish_file(temporary, path)


def copy_atomic(source: Path, target: Path) -> None:
    """Copy a file so that `target` is whole or absent."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(target)
    with source.open("rb") as reader, temporary.open("wb") as writer:
        shutil.copyfileobj(reader, writer, _BLOCK)
        writer.flush()
        sync_file(writer.fileno())
    publish_file(temporary, target)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def publish_file(temporary: Path, target: Path) -> None:
    """Rename an fsynced temporary file to its final name, durably."""
    temporary.replace(target)
    sync_folder(target.parent)


def require_space(folder: Path, needed_bytes: int, purpose: str) -> None:
    """Check the free space of the disk that holds `folder`.

    Raises:
        DiskSpaceError: less than `needed_bytes` are free.
    """
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise DiskSpaceError(
            f"{folder}: {purpose} needs {needed_bytes / 1e9:,.2f} GB, the disk has "
            f"{free / 1e9:,.2f} GB free. Free {(needed_bytes - free) / 1e9:,.2f} GB or choose a "
            "workspace on another disk."
        )


@contextmanager
def full_disk_named(folder: Path) -> Generator[None]:
    """Turn "no space left" of any write in the block into a message.

    Raises:
        DiskSpaceError: the disk, or the quota, is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        free = shutil.disk_usage(folder).free
        raise DiskSpaceError(
            f"{folder}: the disk is full ({error.strerror}; {free / 1e9:,.2f} GB free). What is "
            "finished is kept; make room and run the same command again."
        ) from None


@contextmanager
def disk_errors_named(folder: Path | None = None) -> Generator[None]:
    """Turn a refusal of the disk, of any write in the block, into a message.

    Args:
        folder: what was to be written, where the system's error names no file.

    Raises:
        OutputError: the disk is read-only, or this user may not write there.
        DiskSpaceError: the disk, or the quota, is full.
    """
    try:
        yield
    except OSError as error:
        message = disk_error(error, folder)
        if message is None:
            raise
        raise message from error


def disk_error(error: OSError, folder: Path | None = None) -> GlmQuantError | None:
    """Return the message of a refusal of the disk, or None for any other error."""
    place = f"{error.filename or folder or 'a file'}: "
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskSpaceError(
            f"{place}the disk is full ({error.strerror}). What is finished is kept; make room and "
            "run the same command again."
        )
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and (error.filename or folder):
        return OutputError(
            f"{place}the system does not let this user write or read here ({error.strerror}). "
            "Choose another folder, or change its permissions; the same command then goes on."
        )
    return None
