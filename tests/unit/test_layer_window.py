"""In which order a pass needs source shards, and what that costs: of the real GLM-5.2."""

import json
import math
from pathlib import Path

import pytest

from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.checkpoint.layer_window import ShardOrder
from glm_quant.model.geometry import Geometry
from tests.conftest import FIXTURES

GEOMETRY = Geometry.from_config(json.loads((FIXTURES / "config.json").read_text()))


@pytest.fixture
def weight_map(release: Path) -> dict[str, str]:
    """The index of the release."""
    return json.loads((release / INDEX_NAME).read_bytes())["weight_map"]


@pytest.fixture
def sizes(weight_map: dict[str, str]) -> dict[str, int]:
    """The bytes of tensors in each of its shards."""
    found: dict[str, int] = {}
    for name, shape, kind in (*GEOMETRY.tensors(), *GEOMETRY.mtp_tensors()):
        size = math.prod(shape) * (4 if kind == "F32" else 2)
        found[weight_map[name]] = found.get(weight_map[name], 0) + size
    return found


def test_each_layer_has_its_shards(weight_map: dict[str, str]) -> None:
    """A layer's shards are all that hold a tensor of it; MTP's own are nobody's."""
    order = ShardOrder(weight_map, GEOMETRY.num_hidden_layers)
    mtp = f"model.layers.{GEOMETRY.num_hidden_layers}."
    for name, shard in weight_map.items():
        at = order.place(name)
        assert (at is None) == name.startswith(mtp)
        assert at is None or shard in order.layers[at]
    assert order.most == 5
    assert len({name for shards in order.layers for name in shards}) == 279
    assert (order.place("model.embed_tokens.weight"), order.place("model.norm.weight")) == (0, 9)


def test_what_the_walk_costs(weight_map: dict[str, str], sizes: dict[str, int]) -> None:
    """GLM-5.2 is fetched once but for the borders of layers that are no neighbours by number."""
    order = ShardOrder(weight_map, GEOMETRY.num_hidden_layers)
    needed = sum(sizes[name] for name in {n for shards in order.layers for n in shards})
    cost = order.cost(sizes, window=3)
    twice = (cost.fetched_bytes - needed) / 1e9
    print(f"{cost.fetched_bytes / 1e9:,.0f} GB fetched of {needed / 1e9:,.0f} GB that are needed,")
    print(f"{twice:,.0f} GB of them twice; {cost.disk_bytes / 1e9:,.1f} GB on disk at most")
    assert 1 < cost.fetched_bytes / needed < 1.05
    assert cost.disk_bytes <= (order.most + 3) * max(sizes.values())
    assert order.cost(sizes, window=0).fetched_bytes == cost.fetched_bytes


def test_shards_of_the_next_layers_stay() -> None:
    """What is wanted soon is kept, what is wanted much later is fetched again; outside tensors."""
    weights = {"model.embed_tokens.weight": "a", "model.norm.weight": "d", "lm_head.weight": "e"}
    weights |= {f"model.layers.{i}.w": shard for i, shard in enumerate("bcdb")}
    weights["model.layers.4.w"] = "mtp"
    order = ShardOrder(weights, 4)
    assert order.layers == (("a", "b", "e"), ("c",), ("d",), ("b",))
    assert order.ahead(1, 2) == ["c", "d"]
    sizes = dict.fromkeys("abcde", 10)
    assert order.cost(sizes, window=0).fetched_bytes == 50  # three places: b is kept
    assert order.cost(sizes, window=0).disk_bytes == 30
    wide = ShardOrder({f"model.layers.{i}.w": shard for i, shard in enumerate("abcda")}, 5)
    assert wide.cost(sizes, window=1).fetched_bytes == 50
    assert wide.cost(sizes, window=9).fetched_bytes == 40
