"""Synthetic checkpoints have the release's shape: keys, packing, straddling experts, dtypes."""

import hashlib
import math
from collections import defaultdict
from pathlib import Path

import pytest
from safetensors import safe_open

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.model.geometry import Geometry
from tests.synthetic import real_config, small_config, write_checkpoint


def test_config_has_the_keys_of_the_release(release: Path) -> None:
    """The configs have exactly the release's keys; the real one has its dims."""
    official = Checkpoint.open(release).config
    for config in (small_config(), real_config(layers=2, experts=4)):
        assert set(config) == set(official)
    different = {
        key
        for key, value in real_config(layers=78, experts=256, dense=3).items()
        if official[key] != value
    }
    allowed = {"eos_token_id", "pad_token_id", "head_dim"}
    assert different <= allowed, different - allowed


def test_real_layer_has_real_shapes(release: Path) -> None:
    """Each tensor of a small number of real layers has the shape that it has in GLM-5.2."""
    official = Geometry.from_config(Checkpoint.open(release).config)
    shapes = {name: shape for name, shape, _ in official.tensors()}
    geometry = Geometry.from_config(real_config(layers=4, experts=5, dense=3))
    for name, shape, _ in geometry.tensors():
        if ".mlp.gate." in name:
            assert shape[1:] == shapes[name][1:]
        else:
            assert shape == shapes[name]


def test_packing_is_that_of_the_release(small: Path) -> None:
    """Tensors are packed greedily in lexicographic order of names; experts straddle shards."""
    checkpoint = Checkpoint.open(small)
    names = list(checkpoint.index.weight_map)
    assert names == sorted(names)
    shards = list(checkpoint.index.weight_map.values())
    assert shards == sorted(shards)
    payload = defaultdict[str, int](int)
    for tensor in checkpoint.tensors.values():
        payload[tensor.shard] += tensor.size_bytes
    alone = [t.shard for t in checkpoint.tensors.values() if t.size_bytes == payload[t.shard]]
    assert all(size <= 190_000 for shard, size in payload.items() if shard not in alone)
    assert checkpoint.index.total_size == sum(payload.values())
    experts = defaultdict[str, set[str]](set)
    for name, shard in checkpoint.index.weight_map.items():
        if ".experts." in name:
            experts[name.rsplit(".", 2)[0]].add(shard)
    assert any(len(shards) > 1 for shards in experts.values())


def test_readable_by_safetensors(small: Path) -> None:
    """The safetensors library reads the shards; only the router's bias is F32."""
    for path in sorted(small.glob("*.safetensors")):
        with safe_open(path, framework="numpy") as shard:
            for name in shard.keys():  # noqa: SIM118 - no dict
                kind = "F32" if name.endswith("e_score_correction_bias") else "BF16"
                assert shard.get_slice(name).get_dtype() == kind


def test_same_seed_same_bytes(tmp_path: Path) -> None:
    """The same config and seed give the same bytes, another seed gives others."""
    config = small_config(layers=1, experts=2)

    def digest(folder: Path, seed: int) -> str:
        write_checkpoint(folder, config, seed=seed)
        data = b"".join(path.read_bytes() for path in sorted(folder.glob("*.safetensors")))
        return hashlib.sha256(data).hexdigest()

    first = digest(tmp_path / "a", 0)
    assert digest(tmp_path / "b", 0) == first
    assert digest(tmp_path / "c", 1) != first


@pytest.mark.parametrize("layers", [1, 4, 9])
def test_size_follows_the_geometry(layers: int) -> None:
    """MTP tensors come on top of the main model's, with an indexer of their own."""
    geometry = Geometry.from_config(small_config(layers))
    main = {name: shape for name, shape, _ in geometry.tensors()}
    mtp = {name: shape for name, shape, _ in geometry.mtp_tensors()}
    assert not main.keys() & mtp.keys()
    assert all(name.startswith(f"model.layers.{layers}.") for name in mtp)
    assert f"model.layers.{layers}.self_attn.indexer.wk.weight" in mtp
    assert sum(math.prod(shape) for shape in mtp.values()) > 0
