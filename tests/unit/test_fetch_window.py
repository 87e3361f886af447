"""No more shards stand on disk than the window allows, and the next ones are fetched ahead."""

import hashlib
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from glm_quant.checkpoint.source import SourceFile
from glm_quant.errors import DiskSpaceError, RunError, SourceError
from glm_quant.hub.fetch import Download
from glm_quant.hub.retry import Patience, TransientError
from glm_quant.hub.window import Window

NAMES = [f"{n}.safetensors" for n in range(8)]
QUICK = Patience(tries=2, first_seconds=0.001)


def content(name: str) -> bytes:
    return name.encode() * 1_000


class Shelf:
    """A remote place that counts what it is asked for."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.asked: list[str] = []
        self.broken: set[str] = set()
        self.seconds = 0.0
        files = {
            name: SourceFile(
                name,
                len(content(name)),
                f"sha256:{name}",
                hashlib.sha256(content(name)).hexdigest(),
            )
            for name in NAMES
        }
        self.window = Window(files, folder, limit, self.make)

    def make(self, file: SourceFile, folder: Path, stop: threading.Event) -> Download:
        @contextmanager
        def open_at(begin: int) -> Iterator[Iterator[bytes]]:
            self.asked.append(file.name)
            if file.name in self.broken:
                raise TransientError("broken")
            yield self.pieces(file.name, begin)

        return Download(file, folder, open_at, patience=QUICK, stop=stop)

    def pieces(self, name: str, begin: int) -> Iterator[bytes]:
        data = content(name)
        for start in range(begin, len(data), 1_000):
            time.sleep(self.seconds)
            yield data[start : start + 1_000]

    def on_disk(self) -> set[str]:
        """The shards of which anything is on disk."""
        return {
            path.name.split("-", 1)[1].removesuffix(".part")
            for path in self.folder.glob("*")
            if path.suffix != ".marks"
        }


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        time.sleep(0.002)


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_never_more_than_the_limit_and_as_many_as_allowed(tmp_path: Path, limit: int) -> None:
    """While one shard is used, the next ones come, up to the window and not beyond."""
    shelf = Shelf(tmp_path, limit)
    shelf.window.expect(NAMES)
    for number, name in enumerate(NAMES):
        assert shelf.window.acquire(name).read_bytes() == content(name)
        wanted = set(NAMES[number : number + limit])
        wait_for(lambda wanted=wanted: shelf.on_disk() == wanted)
        time.sleep(0.01)
        assert shelf.on_disk() == wanted
        shelf.window.release(name)
    assert shelf.on_disk() == set()
    assert sorted(shelf.asked) == NAMES
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_touched_before_it_is_needed(tmp_path: Path) -> None:
    """Making a window neither fetches nor deletes: the lock may be somebody else's."""
    (tmp_path / "leftover").write_text("of another run")
    shelf = Shelf(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["leftover"]
    shelf.window.expect(NAMES[:1])
    assert not (tmp_path / "leftover").exists()


def test_a_window_full_of_shards_in_use_is_an_error_and_no_deadlock(tmp_path: Path) -> None:
    """The message names the way out."""
    shelf = Shelf(tmp_path, 2)
    shelf.window.acquire(NAMES[0])
    shelf.window.acquire(NAMES[1])
    with pytest.raises(RunError, match="2 shards are in use"):
        shelf.window.acquire(NAMES[2])
    assert shelf.window.acquire(NAMES[1]).is_file(), "what is held may be acquired again"


def test_out_of_order_gives_up_what_was_fetched_ahead(tmp_path: Path) -> None:
    """A shard that nobody expected now takes the place of the one needed last."""
    shelf = Shelf(tmp_path, 2)
    shelf.window.expect(NAMES[:4])
    shelf.window.acquire(NAMES[0])
    wait_for(lambda: shelf.on_disk() == set(NAMES[:2]))
    assert shelf.window.acquire(NAMES[7]).read_bytes() == content(NAMES[7])
    assert shelf.on_disk() == {NAMES[0], NAMES[7]}
    shelf.window.release(NAMES[0])
    shelf.window.release(NAMES[7])
    assert shelf.window.acquire(NAMES[1]).read_bytes() == content(NAMES[1])


def test_a_failure_is_raised_where_the_shard_is_acquired(tmp_path: Path) -> None:
    """Shards before it are not affected, and asking again tries again."""
    shelf = Shelf(tmp_path, 3)
    shelf.broken.add(NAMES[1])
    shelf.window.expect(NAMES[:3])
    shelf.window.acquire(NAMES[0])
    with pytest.raises(SourceError, match=r"1\.safetensors.*2 tries"):
        shelf.window.acquire(NAMES[1])
    shelf.broken.clear()
    assert shelf.window.acquire(NAMES[1]).read_bytes() == content(NAMES[1])


def test_a_new_order_stops_what_it_does_not_name(tmp_path: Path) -> None:
    """Downloads of shards that are needed no more end, and their parts go."""
    shelf = Shelf(tmp_path, 2)
    shelf.seconds = 0.02
    shelf.window.expect(NAMES[:2])
    wait_for(lambda: shelf.on_disk() == set(NAMES[:2]))
    shelf.seconds = 0.0
    shelf.window.expect(NAMES[4:6])
    assert shelf.window.acquire(NAMES[4]).read_bytes() == content(NAMES[4])
    assert shelf.window.acquire(NAMES[5]).read_bytes() == content(NAMES[5])
    wait_for(lambda: shelf.on_disk() == set(NAMES[4:6]))


@pytest.mark.parametrize("limit", [1, 2])
def test_what_a_stopped_run_held_takes_no_place_from_the_next(tmp_path: Path, limit: int) -> None:
    """A new order begins with nothing in use; a shard that is needed later gives way."""
    shelf = Shelf(tmp_path, limit)
    for name in NAMES[:limit]:
        shelf.window.acquire(name)
    shelf.window.expect(())
    shelf.window.expect([NAMES[5], *NAMES[:limit]])
    assert shelf.window.acquire(NAMES[5]).read_bytes() == content(NAMES[5])
    assert len(shelf.on_disk()) <= limit
    shelf.window.release(NAMES[5])
    assert shelf.window.acquire(NAMES[0]).read_bytes() == content(NAMES[0])


def test_expecting_nothing_stops_and_keeps(tmp_path: Path) -> None:
    """After a failure the line is quiet, and what was fetched waits for the next run."""
    shelf = Shelf(tmp_path, 2)
    shelf.seconds = 0.01
    shelf.window.expect(NAMES)
    wait_for(lambda: len(shelf.on_disk()) == 2)
    shelf.window.expect(())
    wait_for(lambda: not [t for t in threading.enumerate() if t.name == "fetch"])
    asked = len(shelf.asked)
    parts = {path.name: path.stat().st_size for path in tmp_path.glob("*.part")}
    assert parts, "the downloads went on to their end"
    time.sleep(0.05)
    assert len(shelf.asked) == asked
    assert parts == {path.name: path.stat().st_size for path in tmp_path.glob("*.part")}


def test_too_little_room_for_a_shard_ahead_waits_for_the_one_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fetching ahead must not fail a run that would fit one shard at a time."""
    full = threading.Event()

    def require_space(_folder: Path, _bytes: int, purpose: str) -> None:
        if full.is_set():
            raise DiskSpaceError(f"no room for {purpose}")

    monkeypatch.setattr("glm_quant.hub.fetch.require_space", require_space)
    shelf = Shelf(tmp_path, 2)
    shelf.window.acquire(NAMES[0])
    full.set()
    shelf.window.expect(NAMES[:2])
    shelf.window.acquire(NAMES[0])
    wait_for(lambda: NAMES[1] in shelf.on_disk())
    time.sleep(0.02)
    full.clear()
    shelf.window.release(NAMES[0])
    assert shelf.window.acquire(NAMES[1]).read_bytes() == content(NAMES[1])


def test_a_window_of_nothing_is_refused(tmp_path: Path) -> None:
    """At least one shard must fit."""
    with pytest.raises(SourceError, match="at least 1"):
        Shelf(tmp_path, 0)
