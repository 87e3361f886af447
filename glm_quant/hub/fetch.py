"""One file from a remote place to this disk: whole and proved, or not there.

The bytes go to `TAG-NAME.part`, and only a file whose size and sha256 are right gets its final
name. `TAG` is made of the file's identity, so bytes of two versions never meet. Beside the part
stands a list of marks, "after so many bytes the sha256 was this": what an earlier process left is
hashed again and cut back to where it still agrees, so a flipped bit costs a block, not the file.
The real clients do none of this: huggingface_hub 2.4 starts anew in each process and compares sizes
only; boto3 checks no range.
"""

import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from glm_quant.artifact import full_disk_named, publish_file, require_space, sync_file
from glm_quant.checkpoint.source import SourceFile
from glm_quant.errors import SourceError
from glm_quant.hub.retry import Attempts, Patience, StoppedError, TransientError

_log = logging.getLogger(__name__)

_BLOCK = 4 << 20
_MARK_BYTES = 16 << 20
# A second whole download settles whether the network or the server's own copy is at fault.
_WHOLE_TRIES = 2

Opener = Callable[[int], AbstractContextManager[Iterator[bytes]]]


def local_name(file: SourceFile) -> str:
    """Return the name that a file has in the source folder of a workspace."""
    tag = hashlib.sha256(file.identity.encode()).hexdigest()[:12]
    return f"{tag}-{file.name}"


class Download:
    """One file on its way into a folder that is ours."""

    def __init__(
        self,
        file: SourceFile,
        folder: Path,
        open_at: Opener,
        *,
        patience: Patience | None = None,
        stop: threading.Event | None = None,
        place: str = "the source",
    ) -> None:
        """Prepare; nothing is read or asked yet.

        Args:
            file: what to fetch.
            folder: where to.
            open_at: returns the file's bytes from a position on, in pieces of any size.
            patience: how often to try.
            stop: set by another thread to end it; what was fetched stays for the next time.
            place: the source, for messages.
        """
        self.file = file
        self.path = folder / local_name(file)
        self.part = folder / f"{self.path.name}.part"
        self.marks = folder / f"{self.path.name}.marks"
        self._folder = folder
        self._open_at = open_at
        self._stop = stop or threading.Event()
        self._what = f"{file.name} of {place}"
        self._attempts = Attempts(patience or Patience(), self._what, self._stop)
        self._digest: Any = hashlib.sha256()
        self._have = 0
        self._marked = 0
        self._taken = 0

    def run(self) -> Path:
        """Bring the file into being and return its path.

        Raises:
            SourceError: it cannot be had, or its content is not what the source promises.
            DiskSpaceError: there is no room for it.
            StoppedError: it was stopped.
        """
        with full_disk_named(self._folder), self._attempts.told():
            return self.path if self._is_there() else self._fetch()

    def discard(self) -> None:
        """Delete whatever there is of the file."""
        for path in (self.path, self.part, self.marks):
            path.unlink(missing_ok=True)

    def _fetch(self) -> Path:
        self._folder.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic()
        with self.part.open("a+b") as part:
            self._resume(part)
            require_space(self._folder, self.file.size_bytes - self._have, self.file.name)
            resumed = self._have
            for attempt in range(1, _WHOLE_TRIES + 1):
                self._fill(part)
                if self._is_right(attempt):
                    break
                self._rewind(part, 0)
            self._mark()
            part.flush()
            sync_file(part.fileno())
        publish_file(self.part, self.path)
        _log.info(
            "%s: fetched, %s bytes over the network, %s were here already, %.1f s",
            self._what,
            f"{self._taken:,}",
            f"{resumed:,}",
            time.monotonic() - begin,
        )
        return self.path

    def _is_there(self) -> bool:
        """Whether an earlier process finished the file, and its bytes are still the ones."""
        if not self.path.is_file():
            return False
        begin = time.monotonic()
        with self.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        wanted = self.file.sha256 or next(
            (digest for offset, digest in self._read_marks() if offset == self.file.size_bytes),
            None,
        )
        if found == wanted and self.path.stat().st_size == self.file.size_bytes:
            _log.info("%s: here already, hashed in %.1f s", self._what, time.monotonic() - begin)
            return True
        _log.warning(
            "%s: the copy on disk has sha256 %s, it should have %s; fetched again",
            self._what,
            found,
            wanted,
        )
        self.discard()
        return False

    def _resume(self, part: BinaryIO) -> None:
        """Hash what is there; keep what agrees with the marks.

        Bytes after the last mark can be kept only where a promised sha256 will judge them.
        """
        size = os.fstat(part.fileno()).st_size
        good, good_digest = 0, hashlib.sha256()
        digest = hashlib.sha256()
        part.seek(0)
        intact = True
        for offset, marked in self._read_marks():
            if not good < offset <= min(size, self.file.size_bytes):
                break
            _hash(part, offset - good, digest)
            if digest.hexdigest() != marked:
                _log.warning(
                    "%s: bytes %s to %s of the partial file changed on disk; fetched again",
                    self._what,
                    f"{good:,}",
                    f"{offset:,}",
                )
                intact = False
                break
            good, good_digest = offset, digest.copy()
        self._marked = good
        if intact and self.file.sha256 is not None and good < size <= self.file.size_bytes:
            part.seek(good)
            _hash(part, size - good, good_digest)
            good = size
        part.truncate(good)
        part.seek(good)
        self._have, self._digest = good, good_digest
        self._rewrite_marks(self._marked)

    def _fill(self, part: BinaryIO) -> None:
        """Append until the size is right, however often it is interrupted."""
        while self._have < self.file.size_bytes:
            before = self._have
            try:
                with self._open_at(before) as pieces:
                    for piece in pieces:
                        self._append(part, piece, before)
                if self._have < self.file.size_bytes:
                    raise TransientError("the answer ended early")
            except TransientError as error:
                if self._have > before:
                    self._attempts.succeed()
                self._attempts.fail(error, f" at byte {self._have:,} of {self.file.size_bytes:,}")

    def _append(self, part: BinaryIO, piece: bytes, opened_at: int) -> None:
        if self._stop.is_set():
            raise StoppedError
        self._taken += len(piece)
        if self._have + len(piece) > self.file.size_bytes:
            # What sends too much is not this file: nothing of the answer can be trusted.
            self._rewind(part, opened_at)
            raise TransientError(f"more than the {self.file.size_bytes:,} bytes were sent")
        part.write(piece)
        self._digest.update(piece)
        self._have += len(piece)
        self._attempts.note_progress()
        if self._have - self._marked >= _MARK_BYTES:
            part.flush()
            self._mark()

    def _rewind(self, part: BinaryIO, position: int) -> None:
        """Cut the part back to a position and hash it again up to there."""
        part.flush()
        part.truncate(position)
        part.seek(0)
        self._digest = hashlib.sha256()
        _hash(part, position, self._digest)
        part.seek(position)
        self._have = position
        self._marked = self._rewrite_marks(position)

    def _is_right(self, attempt: int) -> bool:
        """Whether the whole file has the promised sha256.

        Raises:
            SourceError: it does not, for the last time.
        """
        found = self._digest.hexdigest()
        if self.file.sha256 is None or found == self.file.sha256:
            return True
        if attempt == _WHOLE_TRIES:
            self.discard()
            raise SourceError(
                f"{self._what}: the source promises sha256 {self.file.sha256}, the fetched file "
                f"has {found}, and so it was {_WHOLE_TRIES} times. What was fetched is deleted. A "
                "proxy may alter it, or the file is damaged at the source; try another network "
                "or tell its owner."
            )
        _log.warning(
            "%s: sha256 should be %s, is %s; fetched again from the first byte",
            self._what,
            self.file.sha256,
            found,
        )
        return False

    def _mark(self) -> None:
        if self._have > self._marked:
            with self.marks.open("a", encoding="ascii") as marks:
                marks.write(f"{self._have} {self._digest.hexdigest()}\n")
            self._marked = self._have

    def _read_marks(self) -> list[tuple[int, str]]:
        """Return the marks; a line torn by a crash ends the list."""
        found: list[tuple[int, str]] = []
        try:
            text = self.marks.read_text(encoding="ascii", errors="replace")
        except FileNotFoundError:
            return found
        for line in text.splitlines():
            offset, _, digest = line.partition(" ")
            if not (offset.isdigit() and len(offset) < 20 and len(digest) == 64):
                break
            found.append((int(offset), digest))
        return found

    def _rewrite_marks(self, end: int) -> int:
        """Keep the marks up to `end`; returns the last of them, or 0."""
        kept = [mark for mark in self._read_marks() if mark[0] <= end]
        if kept or self.marks.exists():
            self.marks.write_text("".join(f"{o} {d}\n" for o, d in kept), encoding="ascii")
        return kept[-1][0] if kept else 0


def _hash(file: BinaryIO, count: int, digest: Any) -> None:
    """Feed the next `count` bytes to a digest."""
    while count > 0:
        block = file.read(min(count, _BLOCK))
        if not block:
            return
        digest.update(block)
        count -= len(block)
