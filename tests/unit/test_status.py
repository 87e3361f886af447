"""Status: what a run would find done, whatever state the workspace is in."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from glm_quant.build import Build, BuildSpec, claimed
from glm_quant.errors import InputError, WeightError
from glm_quant.quantize.records import RemoteShard
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.download import DownloadStage
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.status import WorkspaceStatus, read_status
from glm_quant.workspace import Workspace
from tests.conftest import run_command

RECIPE = """\
name: status
description: several shards
shard_bytes: 300_000
rules:
  - match: "^(?!model.layers.4)"
    dtype: source
  - group: mtp
    drop: true
"""

HOLD = """
import sys, time
from pathlib import Path
from glm_quant.workspace import Workspace
with Workspace(Path(sys.argv[1])).locked():
    print("held", flush=True)
    time.sleep(60)
"""


def ignore(done: int, total: int) -> None:
    pass


@pytest.fixture
def build(small_copy: Path, tmp_path: Path) -> Build:
    recipe = tmp_path / "status.yaml"
    recipe.write_text(RECIPE)
    spec = BuildSpec(recipe=str(recipe), source=str(small_copy), workspace=str(tmp_path / "work"))
    opened = Build(spec)
    opened.workspace.create()
    return opened


def stages(status: WorkspaceStatus) -> dict[str, tuple[int, int]]:
    return {stage.stage: (stage.done, stage.total) for stage in status.stages}


def test_progress_of_a_build(build: Build) -> None:
    """Stage after stage shows as done; a shard whose file is gone does not."""
    root = build.workspace.root
    DownloadStage(build).run(ignore)
    PlanStage(build).run(ignore)
    count = len(build.plan.shards)
    assert count > 2
    begun = read_status(root)
    assert stages(begun)["plan"] == (1, 1)
    assert stages(begun)["quantize"] == (0, count)
    assert begun.recipe == "status"
    assert begun.running is None
    for shard in range(count):
        QuantizeStage(build, shard).run(ignore)
        done, total = stages(read_status(root))["quantize"]
        assert shard < done <= total == count  # the engine works ahead
    AssembleStage(build).run(ignore)
    whole = read_status(root)
    assert whole.done_bytes == whole.total_bytes == sum(s.size_bytes for s in build.plan.shards)
    assert stages(whole)["assemble"] == (1, 1)
    (build.workspace.checkpoint / build.plan.shards[0].name).unlink()
    assert stages(read_status(root))["quantize"] == (count - 1, count)


def test_what_a_run_would_do_again_is_not_called_done(build: Build) -> None:
    """An edited recipe undoes what depends on it; shards that only targets have count as done.

    Where the source is not at hand the records are shown, and it is said that they are.
    """
    root, recipe = build.workspace.root, Path(build.spec.recipe)
    with claimed(build.spec, shared=True):
        DownloadStage(build).run(ignore)
        PlanStage(build).run(ignore)
        count = len(build.plan.shards)
        for shard in range(count):
            QuantizeStage(build, shard).run(ignore)
        AssembleStage(build).run(ignore)
    name = build.plan.shards[0].name
    finished = build.conversion.outputs.finished(0)
    assert finished is not None
    (build.workspace.checkpoint / name).unlink()
    RemoteShard(fingerprint="", outputs=finished.outputs, target="hf://org/x").save(
        build.conversion.outputs.remote_record_path(name)
    )

    def shown() -> dict[str, Any]:
        return json.loads(run_command("status", root, "--json").stdout)

    def done(status: dict[str, Any]) -> dict[str, int]:
        return {stage["stage"]: stage["done"] for stage in status["stages"]}

    whole = shown()
    assert whole["unchecked"] is None
    assert done(whole)["quantize"] == count
    assert done(whole)["assemble"] == 1
    assert whole["done_bytes"] == whole["total_bytes"]
    recipe.write_text(RECIPE.replace("dtype: source", "dtype: float32"))
    edited = done(shown())
    assert (edited["download"], edited["plan"], edited["assemble"]) == (1, 0, 0)
    assert edited["quantize"] < count
    recipe.write_text(RECIPE)
    shutil.move(build.checkpoint.source.uri, root.parent / "away")
    away = shown()
    assert "no such folder" in away["unchecked"]
    assert done(away)["quantize"] == count


def test_failure_is_shown_until_it_is_healed(build: Build) -> None:
    """Why the last run stopped is shown with stage, kind and message, until the stage succeeds."""
    root = build.workspace.root
    PlanStage(build).run(ignore)
    path = Path(build.checkpoint.source.uri) / "model-00001-of-00029.safetensors"
    good = path.read_bytes()
    info = next(t for t in build.checkpoint.tensors.values() if t.shard == path.name)
    path.write_bytes(good[: info.begin] + b"\xc0\x7f" + good[info.begin + 2 :])
    shard = next(
        number
        for number in range(len(build.plan.shards))
        if any(tensor.name == info.name for tensor in build.plan.shards[number].tensors)
    )
    with pytest.raises(WeightError):
        QuantizeStage(build, shard).run(ignore)
    failure = read_status(root).failure
    assert failure is not None
    assert (failure.stage, failure.error) == ("quantize", "WeightError")
    assert info.name in failure.message
    path.write_bytes(good)
    QuantizeStage(build, shard).run(ignore)
    assert read_status(root).failure is None


def test_running_process_is_shown(build: Build) -> None:
    """While a process works here, its number is shown; looking does not disturb it."""
    root = build.workspace.root
    PlanStage(build).run(ignore)
    command = [sys.executable, "-c", HOLD, str(root)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        assert read_status(root).running == str(other.pid)
        other.kill()
    assert read_status(root).running is None
    with Workspace(root).locked():
        pass


@pytest.mark.parametrize("content", ["", "{", '{"fingerprint": "x"}'])
def test_records_that_cannot_be_read(build: Build, content: str) -> None:
    """A torn plan record counts as no plan, and a torn failure as none."""
    root = build.workspace.root
    PlanStage(build).run(ignore)
    (build.workspace.records / "failure.json").write_text(content)
    assert read_status(root).failure is None
    (build.workspace.records / "plan.json").write_text(content)
    with pytest.raises(InputError, match="nothing was planned here yet"):
        read_status(root)


def test_no_workspace(tmp_path: Path) -> None:
    """A folder that is none is bad input with the way out."""
    with pytest.raises(InputError, match="Give the folder that `glm-quant run` got as"):
        read_status(tmp_path / "none")
