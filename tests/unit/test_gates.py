"""Nothing goes out unproved, and what would be refused in the end is refused at the beginning."""

from pathlib import Path

import pytest

from glm_quant.build import Build, BuildSpec
from glm_quant.errors import PublishError
from glm_quant.stages.gates import check_targets, publishable_files
from glm_quant.stages.publishing import PublishStage, early_targets
from glm_quant.testbed import tiny_glm_path

RECIPE = """\
name: gates
description: everything as it is
rules:
  - {group: mtp, drop: true}
  - {match: ".", dtype: source}
publish:
  license: psf-2.0
"""
LICENSE = "3b2f81fe21d181c499c59a256c8e1968455d6689d269aa85373bfb6af41da3bf"
ACKNOWLEDGED = f"  acknowledge_license: {LICENSE}\n"


def opened(tmp_path: Path, recipe: str, *targets: str) -> Build:
    path = tmp_path / "gates.yaml"
    path.write_text(recipe)
    source, workspace = str(tiny_glm_path()), str(tmp_path / "work")
    return Build(BuildSpec(recipe=str(path), source=source, workspace=workspace, targets=targets))


def test_an_unproved_build_is_refused(tmp_path: Path) -> None:
    """Without a passing parity record nothing is published, not even to a folder."""
    target = tmp_path / "published"
    build = opened(tmp_path, RECIPE + ACKNOWLEDGED, str(target))
    check_targets(build)
    with pytest.raises(PublishError, match="stage 'parity' has no passing record"):
        PublishStage(build, str(target)).run(lambda *_: None)
    assert not target.exists()


def test_a_licence_that_nobody_acknowledged_is_refused_first(tmp_path: Path) -> None:
    """Before anything is made, where there is a target; and again before publishing."""
    check_targets(opened(tmp_path, RECIPE))
    build = opened(tmp_path, RECIPE, str(tmp_path / "published"))
    for refuse in (check_targets, publishable_files):
        with pytest.raises(
            PublishError, match=r"gates\.yaml: publish: .*acknowledge_license: 3b2f"
        ):
            refuse(build)


def test_an_address_that_is_none_is_refused_first(tmp_path: Path) -> None:
    """A typing error costs seconds, not a conversion."""
    with pytest.raises(PublishError, match="hf://org/name"):
        check_targets(opened(tmp_path, RECIPE + ACKNOWLEDGED, "hf://org"))


def test_shards_go_early_where_that_pays(tmp_path: Path) -> None:
    """To what is far away; to a folder only where the local copy is to go."""
    targets = ("hf://org/name", "s3://bucket/prefix", str(tmp_path / "published"))
    assert early_targets(opened(tmp_path, RECIPE, *targets)) == targets[:2]
    let_go = f"{RECIPE}  keep_local: false\n"
    assert early_targets(opened(tmp_path, let_go, *targets)) == targets


def test_a_build_whose_shards_are_let_go_needs_less_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is planned for: the shards that fill together, and one that is being uploaded."""
    recipe = RECIPE.replace("rules:", "shard_bytes: 100_000\nrules:")
    conversion = opened(tmp_path, recipe, str(tmp_path / "published")).conversion
    asked: list[int] = []
    monkeypatch.setattr(
        "glm_quant.quantize.convert.require_space", lambda _, needed, __: asked.append(needed)
    )
    for let_go in (False, True):
        conversion.check_space(let_go)
    sizes = sorted(shard.size_bytes for shard in conversion.plan.shards)
    open_at_once = conversion.schedule.open_outputs
    assert asked == [sum(sizes), sum(sizes[-open_at_once - 1 :])]
    assert open_at_once + 1 < len(sizes)
