"""The few source shards that stand on disk at a time, fetched ahead of whoever uses them.

A shard takes a place from the first byte of its download until it is released, so at no moment
more than `limit` of them, whole or partial, are in the folder. The folder is ours alone: whatever
else is found in it is a leftover and is deleted. Nothing is touched before the first shard is
expected or acquired, since only then the caller holds the workspace's lock.
"""

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from contextvars import copy_context
from pathlib import Path

from glm_quant.checkpoint.source import SourceFile
from glm_quant.errors import RunError, SourceError
from glm_quant.hub.fetch import Download
from glm_quant.hub.retry import StoppedError
from glm_quant.litter import entries

_log = logging.getLogger(__name__)

DEFAULT_WINDOW = 3

# Two at a time hide each other's connection set-up and final fsync; more would only share the line.
_STREAMS = 2

MakeDownload = Callable[[SourceFile, Path, threading.Event], Download]


class Window:
    """At most `limit` files of one source in one folder.

    One caller acquires and releases; threads of the window fetch. They end by themselves when
    nothing is left to do, and are daemons: a download may be cut at any byte, and goes on from it.
    """

    def __init__(
        self,
        files: Mapping[str, SourceFile],
        folder: Path,
        limit: int,
        make_download: MakeDownload,
    ) -> None:
        """Prepare; the folder is not touched yet.

        Raises:
            SourceError: a window of no shard at all.
        """
        if limit < 1:
            raise SourceError(f"A window of {limit} shards holds nothing; give at least 1.")
        self._files = files
        self._folder = folder
        self._limit = limit
        self._make_download = make_download
        self._changed = threading.Condition()
        self._threads = 0
        self._order: list[str] = []
        self._running: dict[str, threading.Event] = {}
        self._ready: dict[str, Path] = {}
        self._held: dict[str, Path] = {}
        self._failed: dict[str, BaseException] = {}
        self._stops = 0
        # Stopped, and to be deleted as soon as their threads have let go of them.
        self._unwanted: set[str] = set()

    @property
    def limit(self) -> int:
        """How many files may be on disk at a time."""
        return self._limit

    def allow(self, limit: int) -> None:
        """Let so many files be on disk at a time from the next `expect` on."""
        with self._changed:
            self._limit = limit

    def expect(self, names: Sequence[str]) -> None:
        """Fetch these in this order; whatever else is in the folder is deleted.

        What was acquired before and not released, by a run that was stopped, is in use no more.
        No names at all: stop fetching and leave everything as it is, for the next time; whoever
        waits in `acquire` is told.
        """
        with self._changed:
            if not names:
                self._stops += 1
                self._changed.notify_all()
            for name, stop in self._running.items():
                if name not in names:
                    stop.set()
                    if names:
                        self._unwanted.add(name)
            self._unwanted -= set(names)
            self._failed.clear()
            self._order = [name for name in names if not self._has(name)]
            if names:
                kept = self._ready | self._held
                self._ready = {name: path for name, path in kept.items() if name in names}
                self._held = {}
                self._sweep(names)
                self._pump()

    def acquire(self, name: str) -> Path:
        """Return the path of a whole file, waiting for it where needed.

        Raises:
            SourceError: it cannot be had.
            DiskSpaceError: there is no room for it.
            RunError: the whole window is held by files that were not released.
            StoppedError: another thread stopped the fetching.
        """
        with self._changed:
            stops = self._stops
            # It failed while it was fetched ahead, perhaps long ago: network and disk may be better
            # now, and only a failure from here on counts.
            self._failed.pop(name, None)
            self._ask_first(name)
            while True:
                if name in self._ready:
                    self._held[name] = self._ready.pop(name)
                if name in self._held:
                    return self._held[name]
                if name in self._failed:
                    raise self._failed.pop(name)
                if self._stops != stops:
                    raise StoppedError
                self._make_place(name)
                self._pump()
                self._changed.wait()

    def release(self, name: str) -> None:
        """Delete a file that was acquired."""
        with self._changed:
            if self._held.pop(name, None) is not None:
                self._download(name, threading.Event()).discard()
                self._pump()

    def _has(self, name: str) -> bool:
        stop = self._running.get(name)
        running = stop is not None and not stop.is_set()
        return running or name in self._ready or name in self._held

    def _ask_first(self, name: str) -> None:
        """Put a file that nobody fetches yet at the head of the queue."""
        if not self._has(name):
            if not self._order:
                self._sweep([name])
            self._order = [name, *(other for other in self._order if other != name)]

    def _make_place(self, name: str) -> None:
        """Give up a file that was fetched ahead if the wanted one cannot begin otherwise."""
        if name in self._running or self._places() < self._limit:
            return
        if len(self._held) >= self._limit:
            raise RunError(
                f"{name}: {self._limit} shards are in use and none was released, so there is no "
                "place for one more. Use a window of more shards."
            )
        if self._ready:
            last = list(self._ready)[-1]
            del self._ready[last]
            self._download(last, threading.Event()).discard()
            self._order.append(last)
        elif self._failed:
            last = list(self._failed)[-1]
            del self._failed[last]
            self._download(last, threading.Event()).discard()
            self._order.append(last)

    def _places(self) -> int:
        return len({*self._running, *self._ready, *self._held, *self._failed})

    def _pump(self) -> None:
        """See to it that enough threads fetch."""
        while self._order and self._threads < _STREAMS and self._places() < self._limit:
            self._threads += 1
            # In the caller's context, so that log lines find the run they belong to.
            work = copy_context().run
            threading.Thread(target=work, args=(self._work,), name="fetch", daemon=True).start()
            if self._threads >= len(self._order):
                return

    def _take(self) -> tuple[str, threading.Event] | None:
        """Return the next file to fetch, if there is a place for one."""
        if self._places() >= self._limit:
            return None
        for name in self._order:
            if name not in self._running:
                self._order.remove(name)
                self._running[name] = threading.Event()
                return name, self._running[name]
        return None

    def _work(self) -> None:
        while True:
            with self._changed:
                taken = self._take()
                if taken is None:
                    self._threads -= 1
                    return
            name, stop = taken
            path: Path | None = None
            failure: BaseException | None = None
            try:
                path = self._download(name, stop).run()
            except StoppedError:
                _log.info("%s: fetching stopped, what is there stays", name)
            except BaseException as error:  # it belongs to whoever acquires the file
                failure = error
            with self._changed:
                del self._running[name]
                if name in self._unwanted:
                    self._unwanted.remove(name)
                    self._download(name, stop).discard()
                    path = failure = None
                    self._pump()
                if path is not None:
                    self._ready[name] = path
                elif failure is not None:
                    self._failed[name] = failure
                self._changed.notify_all()

    def _download(self, name: str, stop: threading.Event) -> Download:
        file = self._files.get(name)
        if file is None:
            raise SourceError(
                f"{name}: the source has no such file; its index is of another build."
            )
        return self._make_download(file, self._folder, stop)

    def _sweep(self, names: Sequence[str]) -> None:
        """Delete every file but those of the shards that will be fetched or are in use."""
        first = [name for name in names if name in self._files][: self._limit]
        kept: set[Path] = set()
        for name in {*first, *self._running, *self._ready, *self._held}:
            download = self._download(name, threading.Event())
            kept |= {download.path, download.part, download.marks}
        if not self._folder.exists():
            return
        for path in entries(self._folder):
            if path not in kept:
                _log.info("%s: a leftover, deleted", path)
                path.unlink()
