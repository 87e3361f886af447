"""The engine: fingerprints that see what matters, records that say what happened."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from glm_quant.errors import DiskSpaceError, InputError, IntegrityError, MissingTensorError
from glm_quant.quantize.convert import ShardRecord
from glm_quant.recipe import Recipe, load_recipe
from tests.plain import PLAIN

from ..conftest import Made, with_quantizer

Prepare = Callable[..., Made]


def test_record_accounts_for_the_shard(made: Made) -> None:
    """A shard's record has its digest, each tensor's, and those of the source bytes behind it."""
    for number, path in enumerate(made.shard_files):
        record = made.conversion.outputs.finished(number)
        assert record is not None
        data = path.read_bytes()
        assert record.outputs[0].sha256 == hashlib.sha256(data).hexdigest()
        for tensor in made.plan.shards[number].tensors:
            found = hashlib.sha256(data[tensor.offset : tensor.offset + tensor.size_bytes])
            assert record.tensors[tensor.name] == found.hexdigest()
        for name, blocks in record.sources.items():
            info = made.checkpoint.tensors[name]
            with made.checkpoint.source.acquire(info.shard).open("rb") as file:
                source = os.pread(file.fileno(), info.size_bytes, info.begin)
            if len(blocks) == 1:
                assert blocks == [hashlib.sha256(source).hexdigest()]


def test_unwritten_shard_has_no_manifest_beside_it(made: Made) -> None:
    """Where a shard is made anew, the manifest of the earlier whole output does not stay."""
    manifest = made.output / "manifest.json"
    assert manifest.exists()
    made.shard_files[0].unlink()
    made.conversion.complete(0)
    assert not manifest.exists()
    made.assemble()
    assert manifest.exists()


def test_fingerprint_sees_what_decides_bytes(small: Path, tmp_path: Path, prepare: Prepare) -> None:
    """Another scheme, another source file or another layout gives another fingerprint."""
    recipe = load_recipe(PLAIN)
    plain = prepare(small, tmp_path, recipe).conversion
    same = prepare(small, tmp_path / "other", recipe, 2).conversion
    assert plain.outputs.fingerprint(0) == same.outputs.fingerprint(0)
    rules = tuple(
        rule.model_copy(update={"bits": 3}) if rule.group == "routed_experts" else rule
        for rule in recipe.rules
    )
    changed = recipe.model_copy(update={"rules": rules})
    smaller = recipe.model_copy(update={"shard_bytes": 100_000})
    for other in (changed, smaller):
        assert prepare(small, tmp_path, other).conversion.outputs.fingerprint(
            0
        ) != plain.outputs.fingerprint(0)


def test_another_quantizer_remakes_what_it_is_for(
    small: Path, tmp_path: Path, prepare: Prepare
) -> None:
    """A quantizer named in one rule changes the shards with that rule's weights, and no others."""
    recipe = with_quantizer(load_recipe(PLAIN), "minmax")
    recipe = recipe.model_copy(update={"shard_bytes": 100_000})
    rules = tuple(
        rule.model_copy(update={"quantizer": "search"}) if rule.group == "routed_experts" else rule
        for rule in recipe.rules
    )
    before = prepare(small, tmp_path, recipe).conversion
    after = prepare(small, tmp_path, recipe.model_copy(update={"rules": rules})).conversion
    for i, shard in enumerate(before.plan.shards):
        holds_experts = any(".switch_mlp." in tensor.name for tensor in shard.tensors)
        assert (before.outputs.fingerprint(i) != after.outputs.fingerprint(i)) == holds_experts
        assert after.plan.shards[i] == shard  # the same bytes in the same places


def test_fingerprint_sees_the_source(
    small_copy: Path, tmp_path: Path, prepare: Prepare, demo_recipe: Recipe
) -> None:
    """A source file that was written again changes the shards that draw on it, and no others."""
    before = prepare(small_copy, tmp_path / "w", demo_recipe).conversion
    file = small_copy / "model-00005-of-00029.safetensors"
    os.utime(file, ns=(0, 0))
    after = prepare(small_copy, tmp_path / "w", demo_recipe).conversion
    shards = range(len(before.plan.shards))
    changed = [i for i in shards if before.outputs.fingerprint(i) != after.outputs.fingerprint(i)]
    assert 0 < len(changed) < len(shards)


def test_progress_is_told(
    small: Path, tmp_path: Path, prepare: Prepare, demo_recipe: Recipe
) -> None:
    """Progress grows to exactly the source bytes of the shard's pass."""
    made = prepare(small, tmp_path, demo_recipe, 2)
    made.workspace.create()
    told: list[tuple[int, int]] = []
    made.conversion.complete(0, lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]
    told.clear()
    made.conversion.complete(0, lambda done, total: told.append((done, total)))
    assert told == []


def test_record_of_another_version_is_not_used(made: Made) -> None:
    """A record whose fingerprint is not today's, or that cannot be read, does not count."""
    path = made.conversion.outputs.record_path(0)
    record = ShardRecord.load(path)
    assert record is not None
    record.model_copy(update={"fingerprint": "0" * 64}).save(path)
    assert made.conversion.outputs.finished(0) is None
    path.write_text("{")
    assert made.conversion.outputs.finished(0) is None


def test_source_that_shrinks_while_it_is_read(
    small_copy: Path, tmp_path: Path, prepare: Prepare, demo_recipe: Recipe
) -> None:
    """A source file that is cut after planning is named with both numbers."""
    made = prepare(small_copy, tmp_path / "w", demo_recipe)
    made.workspace.create()
    for path in small_copy.glob("*.safetensors"):
        os.truncate(path, 4000)
    with pytest.raises(IntegrityError, match=r"tensor \S+: [\d,]+ bytes were expected, "):
        made.complete_all()


def test_space_counts_what_is_written(
    small: Path,
    tmp_path: Path,
    prepare: Prepare,
    demo_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A begun shard counts with what its sparse file does not hold yet, not as if it were done."""
    made = prepare(small, tmp_path, demo_recipe)
    made.workspace.create()
    made.conversion.check_space()
    made.workspace.partial.mkdir()
    shard = made.plan.shards[0]
    with (made.workspace.partial / f"{shard.name}.part").open("wb") as file:
        file.truncate(shard.size_bytes)
    asked: list[int] = []
    monkeypatch.setattr(
        "glm_quant.quantize.convert.require_space", lambda _, needed, __: asked.append(needed)
    )
    made.conversion.check_space()
    assert asked == [sum(s.size_bytes for s in made.plan.shards)]


def test_disk_too_small(
    small: Path,
    tmp_path: Path,
    prepare: Prepare,
    demo_recipe: Recipe,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where the build does not fit on the disk, nothing is begun."""
    made = prepare(small, tmp_path / "w", demo_recipe)
    made.workspace.create()

    class Usage:
        free = 1000

    monkeypatch.setattr("glm_quant.artifact.shutil.disk_usage", lambda _: Usage)
    with pytest.raises(DiskSpaceError, match="the build needs"):
        made.conversion.check_space()
    assert not made.workspace.partial.exists()


def test_no_workers_and_no_weights(
    release: Path, small: Path, tmp_path: Path, prepare: Prepare, demo_recipe: Recipe
) -> None:
    """Without workers or without weights a conversion is bad input; planning needs no weights."""
    with pytest.raises(InputError, match="0 workers cannot work"):
        prepare(small, tmp_path, demo_recipe, 0)
    planned = prepare(release, tmp_path, load_recipe("dynamic-2.56bpw"))
    with pytest.raises(MissingTensorError, match="282 of 282 shards are missing"):
        planned.conversion.complete(0)
