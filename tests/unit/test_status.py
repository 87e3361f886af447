"""Status: read from records alone, whatever state the workspace is in."""

import subprocess
import sys
from pathlib import Path

import pytest

from glm_quant.build import Build, BuildSpec
from glm_quant.errors import InputError, WeightError
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.download import DownloadStage
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.status import WorkspaceStatus, read_status
from glm_quant.workspace import Workspace

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
