"""What a build may be compared with, and how the command line names it."""

from dataclasses import replace
from pathlib import Path

import pytest

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import InputError
from glm_quant.evaluation.baselines import open_baseline, parse_baselines


def test_baselines_of_the_command_line_have_name_and_place() -> None:
    assert parse_baselines(["golden=hf=1/work", "other=b"]) == {"golden": "hf=1/work", "other": "b"}
    for wrong in ("golden", "=place", "name="):
        with pytest.raises(InputError, match=r"--baseline .*: give NAME=PLACE"):
            parse_baselines([wrong])


def test_a_build_knows_its_source_by_every_shard(made_once: Path, small: Path) -> None:
    """Name and size decide, and sha256 where both sides have one; more shards do no harm."""
    baseline = open_baseline("first", str(made_once / "work" / "checkpoint"))
    source = Checkpoint.open(small)
    assert baseline.is_of(source)
    assert not open_baseline("source itself", str(small)).is_of(source)
    name = source.index.shards[0]
    shard = source.files[name]
    source.files = {**source.files, name: replace(shard, sha256="ab" * 32)}
    assert baseline.is_of(source)
    source.files = {**source.files, name: replace(shard, size_bytes=1)}
    assert not baseline.is_of(source)
    source.files = {"config.json": source.files["config.json"]}
    assert not baseline.is_of(source)
