"""The pipeline: how many source shards are in use at a time, whatever is slow."""

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from glm_quant.checkpoint.source import FolderSource
from glm_quant.recipe import Recipe

from ..conftest import Made


class CountedSource(FolderSource):
    """A folder of which some files may be in use at a time, and whose release takes a while."""

    def __init__(self, folder: Path, places: int) -> None:
        super().__init__(folder)
        self._places = places
        self._lock = threading.Lock()
        self.used: set[str] = set()
        self.most = 0

    @property
    def places(self) -> int | None:
        return self._places

    def expect(self, names: Sequence[str]) -> None:  # noqa: ARG002 - the protocol has it
        with self._lock:
            self.used.clear()

    def acquire(self, name: str) -> Path:
        with self._lock:
            self.used.add(name)
            self.most = max(self.most, len(self.used))
        return super().acquire(name)

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        with super().acquire(name).open("rb") as file:
            file.seek(begin)
            return file.read(-1 if end is None else end - begin)

    def release(self, name: str) -> None:
        time.sleep(0.01)
        with self._lock:
            self.used.discard(name)


@pytest.mark.parametrize("places", [1, 2, 3])
def test_no_more_source_shards_than_there_are_places(
    small: Path, tmp_path: Path, demo_recipe: Recipe, prepare: Callable[..., Made], places: int
) -> None:
    """The next shard is acquired only after the one whose place it takes was released."""
    source = CountedSource(small, places)
    made = prepare(source, tmp_path, demo_recipe)
    made.complete_all()
    assert 1 <= source.most <= places
