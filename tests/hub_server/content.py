"""Repositories as the server holds them: commits of files, files as something that yields bytes."""

import hashlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
_LFS_ENDINGS = (".safetensors", ".bin", ".png", ".parquet", "tokenizer.json")

# Yields the bytes from `begin` to `end`, in pieces.
Reader = Callable[[int, int], Iterator[bytes]]


@dataclass(frozen=True)
class Content:
    """A file. Its bytes need not be on disk: a large source can be made while it is sent."""

    size: int
    sha256: str
    git_oid: str
    read: Reader

    @classmethod
    def of(cls, path: Path) -> "Content":
        """Return the content of a file on disk."""
        stat = path.stat()
        return _of_file(path, stat.st_size, stat.st_mtime_ns)

    @classmethod
    def of_bytes(cls, data: bytes) -> "Content":
        """Return some bytes as content."""

        def read(begin: int, end: int) -> Iterator[bytes]:
            yield data[begin:end]

        return cls(len(data), hashlib.sha256(data).hexdigest(), git_blob(data), read)

    @classmethod
    def generated(cls, size: int, sha256: str, read: Reader) -> "Content":
        """Return content that is made when asked for."""
        return cls(size, sha256, "0" * 40, read)


@cache
def _of_file(path: Path, size: int, _changed: int) -> Content:
    digest, blob = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size)  # noqa: S324 - git's own
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            blob.update(block)

    def read(begin: int, end: int) -> Iterator[bytes]:
        with path.open("rb") as file:
            file.seek(begin)
            while begin < end and (block := file.read(min(_BLOCK, end - begin))):
                begin += len(block)
                yield block

    return Content(size, digest.hexdigest(), blob.hexdigest(), read)


def git_blob(data: bytes) -> str:
    """Return the id that git gives to a blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # noqa: S324 - git's own


def is_lfs(name: str) -> bool:
    """Whether the Hub keeps a file outside git."""
    return name.endswith(_LFS_ENDINGS)


_numbers = itertools.count(1)


@dataclass
class Repo:
    """A repository: every commit that ever was, and where the branches stand."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, Content]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    lfs: set[str] = field(default_factory=set)
    # The title and time of each commit.
    told: dict[str, tuple[str, datetime]] = field(default_factory=dict)

    def commit(
        self, files: dict[str, Content], branch: str = "main", title: str = "initial commit"
    ) -> str:
        """Make a commit and move a branch to it."""
        seed = f"{next(_numbers)}".encode()
        commit = hashlib.sha1(seed).hexdigest()  # noqa: S324 - a name like git's
        self.commits[commit] = dict(files)
        self.told[commit] = title, datetime.now(UTC)
        self.lfs |= {content.sha256 for name, content in files.items() if is_lfs(name)}
        self.branches[branch] = commit
        return commit

    def resolve(self, revision: str) -> str | None:
        """Return the commit that a branch or a commit names."""
        commit = self.branches.get(revision, revision)
        return commit if commit in self.commits else None


def direct_entries(files: dict[str, Content], inside: str) -> list[dict[str, Any]]:
    """Return a folder's own files and folders."""
    names = dict.fromkeys(path.removeprefix(inside).partition("/")[0] for path in files)
    return [
        tree_entry(inside + name, files[inside + name])
        if inside + name in files
        else {"type": "directory", "path": inside + name, "size": 0, "oid": "0" * 40}
        for name in names
    ]


def tree_entry(path: str, content: Content) -> dict[str, Any]:
    """Return what the tree says of a file."""
    said: dict[str, Any] = {
        "type": "file",
        "path": path,
        "size": content.size,
        "oid": content.git_oid,
    }
    if is_lfs(path):
        said["lfs"] = {"oid": content.sha256, "size": content.size, "pointerSize": 130}
    return said
