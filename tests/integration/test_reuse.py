"""What was made before is copied: after a recipe edit, and from another build."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from glm_quant.errors import IntegrityError
from glm_quant.quantize import job_runner
from glm_quant.quantize.convert import Conversion
from glm_quant.recipe import Recipe, Rule
from tests.conftest import Made
from tests.synthetic import small_config, write_checkpoint

Prepare = Callable[..., Made]


def contents(made: Made) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(made.output.iterdir())}


@pytest.fixture
def first(small: Path, tmp_path: Path, demo_recipe: Recipe, prepare: Prepare) -> Made:
    """Give a finished build; of a folder, weights are known by its path too."""
    made = prepare(small, tmp_path / "work", demo_recipe)
    made.complete_all()
    made.assemble()
    return made


def with_rule(recipe: Recipe, group: str, bits: int) -> Recipe:
    rules = tuple(
        Rule(group=group, bits=bits) if rule.group == group else rule  # type: ignore[arg-type]
        for rule in recipe.rules
    )
    return recipe.model_copy(update={"rules": rules})


@pytest.fixture
def read(first: Made, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Give the source tensors that are read from here on."""
    names: list[str] = []
    load = job_runner.load_parts

    def noted(parts: Any, *rest: Any) -> object:
        names.append(parts[0][0].source)
        return load(parts, *rest)

    monkeypatch.setattr(job_runner, "load_parts", noted)
    return names


def test_recipe_edit_copies_the_other_groups(
    first: Made, prepare: Prepare, read: list[str]
) -> None:
    """With wider experts every shard moves; the experts alone are made again, to the same bytes."""
    source = Path(first.checkpoint.source.uri)
    recipe = with_rule(first.recipe, "routed_experts", 3)
    again = prepare(source, first.workspace.root, recipe)
    again.complete_all()
    again.assemble()
    assert read
    assert all(".mlp.experts." in name for name in read)
    fresh = prepare(source, first.workspace.root.with_name("fresh"), recipe)
    fresh.complete_all()
    fresh.assemble()
    assert contents(again) == contents(fresh)
    assert not again.workspace.previous.exists()


def test_two_recipes_share_what_is_equal(
    first: Made, prepare: Prepare, tmp_path: Path, read: list[str]
) -> None:
    """Another build takes what this one has, and this one stays as it is."""
    before = contents(first)
    recipe = with_rule(first.recipe, "routed_experts", 4)
    source = Path(first.checkpoint.source.uri)
    other = prepare(source, tmp_path / "other", recipe)
    other.conversion = Conversion(
        other.checkpoint, other.plan, other.workspace, 2, reuse=[first.workspace]
    )
    with other.conversion:
        other.complete_all()
    other.assemble()
    assert read
    assert all(".mlp.experts." in name for name in read)
    assert contents(first) == before
    fresh = prepare(source, tmp_path / "fresh", recipe)
    fresh.complete_all()
    fresh.assemble()
    assert contents(other) == contents(fresh)


def test_more_shards_by_another_name_are_renamed(
    first: Made, demo_recipe: Recipe, prepare: Prepare, read: list[str]
) -> None:
    """Where only the last shards change, those before get their new names and are not copied."""
    last = first.plan.weights[-1].weight.path
    rule = Rule(match=f"^{last}$", bits=8) if first.plan.weights[-1].weight.quantizable else None
    rule = rule or Rule(match="^lm_head$", bits=8)
    recipe = demo_recipe.model_copy(update={"rules": (rule, *demo_recipe.rules)})
    inodes = {path.stat().st_ino for path in first.shard_files}
    again = prepare(Path(first.checkpoint.source.uri), first.workspace.root, recipe)
    again.complete_all()
    again.assemble()
    assert len(set(read)) <= 2
    assert inodes & {path.stat().st_ino for path in again.shard_files}


def test_a_damaged_donor_is_named(first: Made, prepare: Prepare, tmp_path: Path) -> None:
    """A copy whose bytes are not the recorded ones stops; the file is named, nothing published."""
    broken = first.shard_files[0]
    with broken.open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)[0]
        file.seek(-1, 2)
        file.write(bytes([last ^ 1]))
    source = Path(first.checkpoint.source.uri)
    other = prepare(source, tmp_path / "other", first.recipe)
    other.conversion = Conversion(
        other.checkpoint, other.plan, other.workspace, 1, reuse=[first.workspace]
    )
    with pytest.raises(IntegrityError, match=rf"{broken.name}: tensor \S+ has sha256 .*delete it"):
        other.complete_all()


def test_equal_size_and_time_in_another_folder_is_no_match(
    first: Made, prepare: Prepare, tmp_path: Path, read: list[str]
) -> None:
    """Another checkpoint whose files happen to have the same sizes and times is not the same."""
    import os

    twin = tmp_path / "twin"
    write_checkpoint(twin, small_config(), shard_bytes=190_000, seed=5)
    for path in Path(first.checkpoint.source.uri).iterdir():
        stat = path.stat()
        os.utime(twin / path.name, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other = prepare(twin, tmp_path / "other", first.recipe)
    other.conversion = Conversion(
        other.checkpoint, other.plan, other.workspace, 1, reuse=[first.workspace]
    )
    other.complete_all()
    assert set(read) >= {
        segment.source for w in other.plan.weights for segment in w.weight.segments
    }
