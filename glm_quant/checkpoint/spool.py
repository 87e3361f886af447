"""A source that is elsewhere, held near for as long as one layer is looked at.

Parity reads each weight twice, for the reference and for our runtime. From the Hub or S3 that would
be the whole checkpoint over the network twice; so what was read once lies in a folder until it is
forgotten. This is no cache of a checkpoint, it never holds more than
was asked for since the last `forget`.
"""

import hashlib
import shutil
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from tempfile import TemporaryDirectory

from glm_quant.artifact import full_disk_named
from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.checkpoint.source import FolderSource, Source, SourceFile
from glm_quant.litter import entries


class SpooledSource:
    """A source whose ranges are written to a folder when they are first read."""

    def __init__(self, source: Source, folder: Path) -> None:
        """Take over `folder`, which exists and is ours alone."""
        self._source = source
        self._folder = folder

    @property
    def uri(self) -> str:
        """The source's own."""
        return self._source.uri

    @property
    def places(self) -> int | None:
        """The source's own."""
        return self._source.places

    def files(self) -> Mapping[str, SourceFile]:
        """Return the source's own."""
        return self._source.files()

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return bytes of a file, from the folder if they were read before.

        Raises:
            DiskSpaceError: the folder's disk is full.
        """
        kept = self._folder / hashlib.sha256(f"{name}:{begin}:{end}".encode()).hexdigest()
        if kept.is_file():
            return kept.read_bytes()
        data = self._source.read(name, begin, end)
        with full_disk_named(self._folder):
            part = kept.with_suffix(".part")
            part.write_bytes(data)
            part.replace(kept)
        return data

    def forget(self) -> None:
        """Delete everything that was kept."""
        for path in entries(self._folder):
            path.unlink()

    def expect(self, names: Sequence[str]) -> None:
        """Pass on."""
        self._source.expect(names)

    def acquire(self, name: str) -> Path:
        """Pass on."""
        return self._source.acquire(name)

    def release(self, name: str) -> None:
        """Pass on."""
        self._source.release(name)

    def allow(self, places: int) -> None:
        """Pass on."""
        self._source.allow(places)


@contextmanager
def spooled(
    checkpoint: Checkpoint, scratch: Path | None = None
) -> Generator[tuple[Checkpoint, SpooledSource | None]]:
    """Give a checkpoint whose reads are kept until forgotten; one in a folder is left as it is.

    Args:
        checkpoint: Where to read.
        scratch: Folder for what is kept; default: the system's folder for temporary files.
    """
    if isinstance(checkpoint.source, FolderSource):
        yield checkpoint, None
        return
    with _scratch(scratch) as folder:
        source = SpooledSource(checkpoint.source, folder)
        near = copy(checkpoint)
        near.source = source
        yield near, source


@contextmanager
def local_folder(checkpoint: Checkpoint, scratch: Path | None = None) -> Generator[Path]:
    """Give a folder with all of a checkpoint, fetched where needed: for small ones.

    Args:
        checkpoint: What to fetch; a folder is given as it is.
        scratch: Folder for what is fetched; default: the system's folder for temporary files.
    """
    source = checkpoint.source
    if isinstance(source, FolderSource):
        yield Path(source.uri)
        return
    with _scratch(scratch) as folder:
        for name in ("config.json", INDEX_NAME):
            if name in checkpoint.files:
                (folder / name).write_bytes(source.read(name))
        for shard in checkpoint.index.shards:
            with full_disk_named(folder):
                shutil.copyfile(source.acquire(shard), folder / shard)
            source.release(shard)
        source.expect(())
        yield folder


@contextmanager
def _scratch(parent: Path | None) -> Generator[Path]:
    if parent is not None:
        shutil.rmtree(parent, ignore_errors=True)  # what a killed run left
        parent.mkdir(parents=True)
    with TemporaryDirectory(dir=parent, prefix="glm-quant-") as name:
        yield Path(name)
