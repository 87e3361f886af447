"""A source that is elsewhere: the same for the Hub and for S3, which differ in how bytes are asked.

Small files and headers are read by range into memory; shards are fetched whole through a window.
"""

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from glm_quant.checkpoint.source import SourceFile
from glm_quant.errors import SourceError
from glm_quant.hub.fetch import Download
from glm_quant.hub.retry import Attempts, Patience, TransientError
from glm_quant.hub.window import DEFAULT_WINDOW, Window

_log = logging.getLogger(__name__)

# The largest header of GLM-5.2 is below 200 KB: one request a shard brings all of it.
_HEAD_BYTES = 256 << 10
_HEADS_KEPT = 32


class Place(Protocol):
    """Where the files are, at one version that does not change any more."""

    @property
    def uri(self) -> str:
        """Its address with the pinned version, without any secret."""
        ...

    @property
    def files(self) -> Mapping[str, SourceFile]:
        """All files by name."""
        ...

    def open_at(self, name: str, begin: int, end: int) -> AbstractContextManager[Iterator[bytes]]:
        """Open bytes `begin` to `end` of a file.

        Raises:
            TransientError: it may work next time; raised on opening or while reading.
            SourceError: it will not.
        """
        ...


class RemoteSource:
    """A checkpoint at a place that has to be fetched."""

    def __init__(
        self,
        place: Place,
        cache: Path | None = None,
        window: int = DEFAULT_WINDOW,
        patience: Patience | None = None,
        on_use: Callable[[], None] | None = None,
    ) -> None:
        """Prepare; the cache is not touched before the first shard is expected or acquired.

        Args:
            place: where the files are.
            cache: a folder that is ours alone, for the window; without it nothing can be acquired.
            window: how many shards may be on disk at a time.
            patience: how often to try.
            on_use: called once, before the first shard is expected or acquired.
        """
        self._place = place
        self._on_use = on_use
        # The place has answered, so its name is right: a name that is not found now may pass.
        self._patience = (patience or Patience()).enduring()
        self._window = (
            None if cache is None else Window(place.files, cache, window, self._make_download)
        )
        self._heads: OrderedDict[str, bytes] = OrderedDict()
        self._heads_lock = threading.Lock()

    @property
    def uri(self) -> str:
        """Where it is, with the pinned version."""
        return self._place.uri

    @property
    def places(self) -> int | None:
        """How many shards may be acquired at a time."""
        return None if self._window is None else self._window.limit

    def files(self) -> Mapping[str, SourceFile]:
        """All files by name."""
        return self._place.files

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return bytes of a file. A whole file is held against what the source promises.

        Raises:
            SourceError: it cannot be had, or its content is not what is promised.
        """
        file = self._file(name)
        end = file.size_bytes if end is None else min(end, file.size_bytes)
        if begin >= end:
            return b""
        if begin == 0 and end == file.size_bytes:
            return self._read_whole(file)
        if end <= _HEAD_BYTES:
            return self._head(file)[begin:end]
        return self._read_range(file, begin, end)

    def expect(self, names: Sequence[str]) -> None:
        """Begin to fetch these shards, in this order."""
        if self._window is not None:
            self._begin_use()
            self._window.expect(names)

    def acquire(self, name: str) -> Path:
        """Return a local path of a whole shard.

        Raises:
            SourceError: it cannot be had, or there is no folder to put it in.
            DiskSpaceError: there is no room for it.
        """
        if self._window is None:
            raise SourceError(
                f"{self.uri}: {name} would have to be fetched, and this command has no workspace "
                "to put it in. Fetch the checkpoint into a folder and give that as --source."
            )
        self._file(name)
        self._begin_use()
        return self._window.acquire(name)

    def release(self, name: str) -> None:
        """Delete the local copy of a shard."""
        if self._window is not None:
            self._window.release(name)

    def allow(self, places: int) -> None:
        """Let so many shards be on disk at a time from now on."""
        if self._window is not None:
            self._window.allow(places)

    def _begin_use(self) -> None:
        if self._on_use is not None:
            self._on_use()
            self._on_use = None

    def _file(self, name: str) -> SourceFile:
        file = self._place.files.get(name)
        if file is None:
            raise SourceError(f"{self.uri}: there is no file {name}. Check the repository.")
        return file

    def _make_download(self, file: SourceFile, folder: Path, stop: threading.Event) -> Download:
        return Download(
            file,
            folder,
            lambda begin: self._place.open_at(file.name, begin, file.size_bytes),
            patience=self._patience,
            stop=stop,
            place=self.uri,
        )

    def _head(self, file: SourceFile) -> bytes:
        """Return the first bytes of a file: a header is read in two steps but asked for once."""
        with self._heads_lock:
            head = self._heads.get(file.name)
        if head is None:
            head = self._read_range(file, 0, min(_HEAD_BYTES, file.size_bytes))
            with self._heads_lock:
                self._heads[file.name] = head
                while len(self._heads) > _HEADS_KEPT:
                    self._heads.popitem(last=False)
        return head

    def _read_whole(self, file: SourceFile) -> bytes:
        found = None
        for _ in range(2):
            data = self._read_range(file, 0, file.size_bytes)
            found = content_identity(file.identity, data)
            if found is None or found == file.identity:
                return data
            _log.warning("%s: %s was promised, %s came", file.name, file.identity, found)
        raise SourceError(
            f"{file.name} of {self.uri}: the source promises {file.identity}, what came has "
            f"{found}, twice. A proxy may alter it, or the file is damaged at the source."
        )

    def _read_range(self, file: SourceFile, begin: int, end: int) -> bytes:
        data = bytearray()
        attempts = Attempts(self._patience, f"{file.name} of {self.uri}")
        with attempts.told():
            while len(data) < end - begin:
                before = len(data)
                try:
                    self._append_range(data, file.name, begin, end)
                except TransientError as error:
                    if len(data) > before:
                        attempts.succeed()
                    attempts.fail(error, f" at byte {begin + len(data):,} of {end:,}")
        return bytes(data)

    def _append_range(self, data: bytearray, name: str, begin: int, end: int) -> None:
        """Append what is missing of bytes `begin` to `end`.

        Raises:
            TransientError: less came, or more than was asked; of the latter nothing is kept.
        """
        before = len(data)
        with self._place.open_at(name, begin + before, end) as pieces:
            for piece in pieces:
                data += piece
                if len(data) > end - begin:
                    del data[before:]
                    raise TransientError(f"more than the {end - begin:,} bytes were sent")
        if len(data) < end - begin:
            raise TransientError("the answer ended early")


def content_identity(like: str, data: bytes) -> str | None:
    """Return the identity of some content in the form of another, None where it says no content.

    `sha256:` is the digest of the bytes; `git:` the id of a git blob.
    """
    kind = like.partition(":")[0]
    if kind == "sha256":
        return f"sha256:{hashlib.sha256(data).hexdigest()}"
    if kind == "git":
        blob = b"blob %d\0" % len(data) + data
        return f"git:{hashlib.sha1(blob, usedforsecurity=False).hexdigest()}"
    return None
