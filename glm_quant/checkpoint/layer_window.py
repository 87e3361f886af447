"""A remote source with the shards of one layer at a time on this disk.

A pass through the model takes layers by number, while a release stores them by name: 1, 10, 11, ...
19, 2, 20. So shards are fetched in an order of their own: those of a layer, then what the next ones
lack. A shard on the border of two layers stays for the second one if that comes next; between
layers that are not neighbours by number (GLM-5.2: around layers 1 to 9) it is fetched twice rather
than kept for long, see `ShardOrder.cost`. Whole shards are fetched, not ranges: only a whole one
can be checked against the sha256 that the source promises, and its download resumes at the byte
where it was cut.
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.checkpoint.source import Source, SourceFile

_EMBEDDINGS = "model.embed_tokens."


@dataclass(frozen=True)
class WindowCost:
    """What a pass through all layers takes.

    Attributes:
        fetched_bytes: of source shards, those that are fetched twice counted twice.
        disk_bytes: the most that is on this disk at a time.
    """

    fetched_bytes: int
    disk_bytes: int


class ShardOrder:
    """Which shards each layer needs, and in which order a pass fetches them.

    A tensor outside of all layers belongs to the first layer that has its shard, so that nothing
    is fetched for it; embeddings and what shares its shard with no layer belong to the first one.
    """

    def __init__(self, weight_map: Mapping[str, str], layers: int) -> None:
        """Sort the shards of an index; layers from number `layers` on (MTP) are not passed."""
        shards: list[set[str]] = [set() for _ in range(layers)]
        outside: list[str] = []
        for name, shard in weight_map.items():
            number = layer_of(name)
            if number is None:
                outside.append(name)
            elif number < layers:
                shards[number].add(shard)
        self._outside: dict[str, int] = {}
        for name in outside:
            shard = weight_map[name]
            layer = next((i for i, names in enumerate(shards) if shard in names), 0)
            self._outside[name] = 0 if name.startswith(_EMBEDDINGS) else layer
        for name, layer in self._outside.items():
            shards[layer].add(weight_map[name])
        self.layers = tuple(tuple(sorted(names)) for names in shards)

    @cached_property
    def most(self) -> int:
        """The most shards that one layer needs."""
        return max(map(len, self.layers))

    def place(self, tensor: str) -> int | None:
        """Return the layer that a tensor belongs to; None for one that is not passed."""
        number = layer_of(tensor)
        if number is None:
            return self._outside[tensor]
        return number if number < len(self.layers) else None

    def ahead(self, layer: int, limit: int) -> list[str]:
        """Return what is needed from a layer on, in order: at most `limit` shards, each once."""
        order = dict.fromkeys(name for shards in self.layers[layer:] for name in shards)
        return list(order)[:limit]

    def cost(self, sizes: Mapping[str, int], window: int) -> WindowCost:
        """Return what a pass through all layers takes.

        Args:
            sizes: of the shards, in bytes.
            window: shards that are fetched ahead, besides those of the current layer.
        """
        local: set[str] = set()
        fetched = most = 0
        for layer in range(len(self.layers)):
            names = set(self.ahead(layer, self.most + window))
            fetched += sum(sizes[name] for name in names - local)
            most = max(most, sum(sizes[name] for name in names))
            local = names
        return WindowCost(fetched, most)


def layer_of(tensor: str) -> int | None:
    """Return the number of a tensor's layer, None if it is in none."""
    parts = tensor.split(".")
    return int(parts[2]) if parts[1:2] == ["layers"] else None


class LayerWindow:
    """A source that has the shards of one layer on this disk, and fetches those of the next."""

    def __init__(self, source: Source, order: ShardOrder, limit: int) -> None:
        """Nothing is fetched yet; `limit` is how many shards may be on disk at a time."""
        self.order = order
        self._source, self._limit = source, limit
        self._local: dict[str, Path] = {}

    @property
    def uri(self) -> str:
        """The source's own."""
        return self._source.uri

    @property
    def places(self) -> int | None:
        """Any number: what may be acquired is on this disk."""
        return None

    def files(self) -> Mapping[str, SourceFile]:
        """Return the source's own."""
        return self._source.files()

    def load(self, layer: int) -> None:
        """Wait for a layer's shards, and begin to fetch the next ones.

        Raises:
            SourceError: a shard cannot be had.
            DiskSpaceError: there is no room for one.
        """
        self._source.expect(self.order.ahead(layer, self._limit))
        self._local = {name: self._source.acquire(name) for name in self.order.layers[layer]}

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return bytes of a file: of a local shard, or from the source."""
        path = self._local.get(name)
        if path is None:
            return self._source.read(name, begin, end)
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(-1 if end is None else max(0, end - begin))

    def expect(self, names: Sequence[str]) -> None:
        """Do nothing: `load` decides what is fetched."""

    def acquire(self, name: str) -> Path:
        """Return the path of a shard of the current layer."""
        return self._local[name]

    def release(self, name: str) -> None:
        """Do nothing: the next `load` releases what it does not need."""

    def allow(self, places: int) -> None:
        """Do nothing: any number may be acquired."""

    def release_all(self) -> None:
        """Release every shard."""
        for name in self._local:
            self._source.release(name)
        self._local = {}


@contextmanager
def open_layer_window(
    checkpoint: Checkpoint, order: ShardOrder
) -> Generator[tuple[Checkpoint, LayerWindow]]:
    """Open a window on a checkpoint; gives the checkpoint that reads through it, and the window.

    What was fetched stays on disk if the block fails, for the next time.
    """
    source = checkpoint.source
    places = source.places
    limit = order.most + (places or 0)
    source.allow(limit)
    try:
        windowed = copy(checkpoint)
        windowed.source = window = LayerWindow(source, order, limit)
        yield windowed, window
        window.release_all()
    finally:
        source.expect(())
        if places is not None:
            source.allow(places)
