"""verify: finds what is changed, missing, stray or from elsewhere, and says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm_quant.artifact import FileDigest, seal
from glm_quant.checkpoint.manifest import Manifest, load_manifest
from glm_quant.errors import CheckpointError, IntegrityError
from glm_quant.quantize.verify import verify
from tests.synthetic import small_config, write_checkpoint

from ..conftest import Made


def rewrite(folder: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of an output and let the manifest agree with it."""
    manifest = load_manifest(folder)
    if name == "manifest.json":
        value = manifest.model_dump(mode="json")
        change(value)
        Manifest.model_validate(value).save(folder)
        return
    value = json.loads((folder / name).read_bytes())
    change(value)
    (folder / name).write_text(json.dumps(value))
    files = [FileDigest.of(folder, d.path) if d.path == name else d for d in manifest.files]
    manifest.model_copy(update={"files": files}).save(folder)


def test_whole_output(made: Made) -> None:
    """A finished output passes, with and without its source; the figures are its own."""
    found = verify(made.output)
    assert found.tensors == sum(1 for _ in made.plan.tensors)
    assert found.rederived_blocks == 0
    assert found.bits_per_weight == made.plan.bits_per_weight
    assert verify(made.output, made.checkpoint.source.uri, samples=8).rederived_blocks == 8


def test_config_that_does_not_fit_the_shards(made: Made) -> None:
    """A quantization config that names other modules than the shards hold scales for is found."""
    rewrite(made.output, "config.json", lambda config: config["quantization"].pop("lm_head"))
    with pytest.raises(IntegrityError, match=r"names \d+ modules, .* scales for \d+; lm_head is"):
        verify(made.output)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization"]["lm_head"].update(bits=3), r"lm_head\.weight has shape"),
        (
            lambda c: c["quantization"]["lm_head"].update(group_size=32),
            r"lm_head\.scales has shape",
        ),
        (
            lambda c: c["quantization"].update(lm_head={"bits": "x"}),
            r"lm_head is .* which mlx-lm does not read",
        ),
        (
            lambda c: c["quantization"]["lm_head"].update(group_size=0),
            r"lm_head is .* which mlx-lm does not read",
        ),
        (lambda c: c.update(vocab_size=128), r"has shape \[256, .*, config\.json implies \[128"),
        (lambda c: c.update(n_routed_experts=13), r"switch_mlp\S+ has shape \[12, .* \[13, "),
        (lambda c: c.update(num_hidden_layers=3, indexer_types=["full"] * 3), "is not implied"),
    ],
)
def test_config_that_implies_other_shapes(
    made: Made, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    """A config that implies other shapes than the shards have is found; both are named."""
    rewrite(made.output, "config.json", change)
    with pytest.raises(IntegrityError, match=message):
        verify(made.output)


def test_index_that_does_not_fit_the_shards(made: Made) -> None:
    """A total_size that is not the shards' is found, with both numbers."""
    name = "model.safetensors.index.json"
    rewrite(made.output, name, lambda index: index["metadata"].update(total_size=12))
    total = f"{made.plan.tensor_bytes:,}"
    with pytest.raises(IntegrityError, match=rf"total_size is 12, the shards hold {total}"):
        verify(made.output)
    rewrite(made.output, name, lambda index: index["weight_map"].pop("lm_head.scales"))
    with pytest.raises(CheckpointError, match=r"holds tensor lm_head\.scales, which .* no shard"):
        verify(made.output)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{\n "format": 1,\n "shards": 3\n}'])
def test_manifest_that_cannot_be_read(made: Made, content: str) -> None:
    """A manifest that was cut or changed, or that is sealed but is none, is named."""
    path = made.output / "manifest.json"
    path.write_text(content)
    with pytest.raises(IntegrityError, match=r"manifest\.json: its seal says"):
        verify(made.output)
    if content.endswith("\n}"):
        path.write_bytes(seal(content))
        with pytest.raises(CheckpointError, match=r"manifest\.json: the manifest cannot be read"):
            verify(made.output)


def test_recipe_of_the_manifest_cannot_be_read(made: Made) -> None:
    """A manifest whose recipe is of another version is said to be, not a traceback."""
    rewrite(made.output, "manifest.json", lambda manifest: manifest["recipe"].update(colour="red"))
    verify(made.output)
    with pytest.raises(CheckpointError, match="its recipe cannot be read"):
        verify(made.output, made.checkpoint.source.uri)


def test_made_from_another_source(made: Made, tmp_path: Path) -> None:
    """With a source of other values, of another packing or of another config, verify says so."""
    other = tmp_path / "other"
    write_checkpoint(other, small_config(), shard_bytes=200_000, seed=1)
    with pytest.raises(IntegrityError, match=r"tensor \S+, [\d,]+ bytes at .* gives other bytes"):
        verify(made.output, other)
    shutil.rmtree(other)
    write_checkpoint(other, small_config(5), shard_bytes=200_000)
    with pytest.raises(IntegrityError, match="was made from another source"):
        verify(made.output, other)


def test_one_changed_block_is_found_with_the_source(made: Made) -> None:
    """A changed byte that the manifest was made to agree with is found against the source."""
    target = made.shard_files[0]
    data = bytearray(target.read_bytes())
    data[-8] ^= 1
    target.write_bytes(data)
    agreed = FileDigest.of(made.output, target.name).model_dump()
    rewrite(made.output, "manifest.json", lambda m: m["shards"][0].update(file=agreed))
    verify(made.output)
    with pytest.raises(IntegrityError, match=rf"{target.name}: tensor .* gives other bytes"):
        verify(made.output, made.checkpoint.source.uri, samples=10**6)


def test_census_is_the_plans(made: Made) -> None:
    """How each group is stored is counted again in the shards and held against the plan's."""
    manifest = load_manifest(made.output)
    experts = manifest.census["routed_experts"]
    assert sum(experts.values()) == sum(
        p.weight.params for p in made.plan.weights if p.weight.group == "routed_experts"
    )
    other = {**manifest.census, "routed_experts": {"3-bit g64": sum(experts.values())}}
    manifest.model_copy(update={"census": other}).save(made.output)
    with pytest.raises(IntegrityError, match=r"group routed_experts is stored as .*the plan was"):
        verify(made.output)
