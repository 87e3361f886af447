"""A source a layer at a time: the shards that a layer lies in are here while it is looked at.

A pass that goes through the model takes layers by number, while a release stores them by name: 1,
10, 11, ... 19, 2, 20. So shards come in an order of their own: those of a layer, then what the next
ones lack. Most shards of a layer's border are also its successor's and stay; those between layers
that are not neighbours by number (GLM-5.2: around layers 1 to 9) are fetched once more when their
other layer comes, rather than kept for long: `Walk.cost` says what that makes. What a reader would
get wrong: whole shards, not ranges of them, because only a whole one can be held against the sha256
that the source promises, and its download goes on from the byte where it was cut.
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
class WalkCost:
    """What bringing every layer near takes.

    Attributes:
        fetched_bytes: of source shards, those that are fetched twice counted twice.
        disk_bytes: the most that is here at a time.
    """

    fetched_bytes: int
    disk_bytes: int


class Walk:
    """Which shards are needed at which layer.

    A tensor outside of all layers belongs to the first layer that has its shard, so that nothing
    is fetched for it; embeddings and what shares its shard with no layer belong to the first one.
    """

    def __init__(self, weight_map: Mapping[str, str], layers: int) -> None:
        """Sort the shards of an index; layers from number `layers` on (MTP) are not walked."""
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
            at = next((i for i, some in enumerate(shards) if shard in some), 0)
            self._outside[name] = 0 if name.startswith(_EMBEDDINGS) else at
        for name, at in self._outside.items():
            shards[at].add(weight_map[name])
        self.layers = tuple(tuple(sorted(some)) for some in shards)

    @cached_property
    def most(self) -> int:
        """The most shards that one layer needs."""
        return max(map(len, self.layers))

    def place(self, tensor: str) -> int | None:
        """Return the layer that a tensor belongs to; None for one that is not walked."""
        number = layer_of(tensor)
        if number is None:
            return self._outside[tensor]
        return number if number < len(self.layers) else None

    def ahead(self, layer: int, limit: int) -> list[str]:
        """Return what is needed from a layer on, in order: at most `limit` shards, each once."""
        order = dict.fromkeys(name for shards in self.layers[layer:] for name in shards)
        return list(order)[:limit]

    def cost(self, sizes: Mapping[str, int], window: int) -> WalkCost:
        """Return what a whole walk takes.

        Args:
            sizes: of the shards, in bytes.
            window: shards that are fetched ahead, besides those of the layer at hand.
        """
        here: set[str] = set()
        fetched = most = 0
        for layer in range(len(self.layers)):
            names = set(self.ahead(layer, self.most + window))
            fetched += sum(sizes[name] for name in names - here)
            most = max(most, sum(sizes[name] for name in names))
            here = names
        return WalkCost(fetched, most)


def layer_of(tensor: str) -> int | None:
    """Return the number of a tensor's layer, None if it is in none."""
    parts = tensor.split(".")
    return int(parts[2]) if parts[1:2] == ["layers"] else None


class NearSource:
    """A source of which the shards of one layer are here."""

    def __init__(self, source: Source, walk: Walk, limit: int) -> None:
        """Nothing is fetched yet; `limit` is how many shards may be here at a time."""
        self.walk = walk
        self._source, self._limit = source, limit
        self._here: dict[str, Path] = {}

    @property
    def uri(self) -> str:
        """The source's own."""
        return self._source.uri

    @property
    def places(self) -> int | None:
        """Any number: what may be acquired is here."""
        return None

    def files(self) -> Mapping[str, SourceFile]:
        """Return the source's own."""
        return self._source.files()

    def hold(self, layer: int) -> None:
        """Bring a layer's shards here, and begin to fetch the next ones.

        Raises:
            SourceError: a shard cannot be had.
            DiskSpaceError: there is no room for one.
        """
        self._source.expect(self.walk.ahead(layer, self._limit))
        self._here = {name: self._source.acquire(name) for name in self.walk.layers[layer]}

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        """Return bytes of a file: of a shard that is here, or from the source."""
        path = self._here.get(name)
        if path is None:
            return self._source.read(name, begin, end)
        with path.open("rb") as file:
            file.seek(begin)
            return file.read(-1 if end is None else max(0, end - begin))

    def expect(self, names: Sequence[str]) -> None:
        """Do nothing: `hold` says what comes."""

    def acquire(self, name: str) -> Path:
        """Return the path of a shard of the layer at hand."""
        return self._here[name]

    def release(self, name: str) -> None:
        """Do nothing: the next `hold` lets go."""

    def allow(self, places: int) -> None:
        """Do nothing: any number may be acquired."""

    def let_go(self) -> None:
        """Let go of every shard."""
        for name in self._here:
            self._source.release(name)
        self._here = {}


@contextmanager
def nearing(checkpoint: Checkpoint, walk: Walk) -> Generator[tuple[Checkpoint, NearSource]]:
    """Give a checkpoint whose layers can be brought near one after the other.

    What was fetched stays on disk if the block fails, for the next time.
    """
    source = checkpoint.source
    places = source.places
    limit = walk.most + (places or 0)
    source.allow(limit)
    try:
        near = copy(checkpoint)
        near.source = held = NearSource(source, walk, limit)
        yield near, held
        held.let_go()
    finally:
        source.expect(())
        if places is not None:
            source.allow(places)
