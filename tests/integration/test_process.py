"""Measurements in processes of their own: what they raise, and that their end is not the flow's."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, ClassVar

import pytest

from glm_quant.build import Build, BuildSpec
from glm_quant.child_process import run_in_child
from glm_quant.data import tiny_glm_path
from glm_quant.errors import EvaluationError, SourceError
from glm_quant.model.precision import users_environment
from glm_quant.settings import DivergenceSettings
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.child_jobs import DIVERGENCE_JOB, DivergenceRequest
from glm_quant.stages.divergence import DivergenceStage
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.quantize import QuantizeStage
from tests.switch_worker import JOB, Question

RECIPE = """\
name: apart
description: As quick as it gets
rules:
  - {group: mtp, drop: true}
  - {group: [norms, router, indexer], dtype: source}
  - {match: .*, bits: 4}
# Half a second a layer: long enough for a kill to come in mid-run on a busy machine.
divergence: {tokens: 2048, context: 64}
parity: {tokens: 72}
"""

# A process like the flow's: it opens a build, runs the parity stage and tells what that took of it.
PARITY = """\
import json, logging, resource, subprocess, sys
from glm_quant.build import Build, BuildSpec
from glm_quant.stages import parity

logging.basicConfig(level=logging.INFO, stream=sys.stderr)
start = subprocess.Popen.__init__

def noted(self, *arguments, **options):
    start(self, *arguments, **options)
    print(self.pid, flush=True)

subprocess.Popen.__init__ = noted
stage = parity.ParityStage(Build(BuildSpec.model_validate_json(sys.argv[1])))
progress = []
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
result = stage.run(lambda done, total: progress.append((done, total)))
print(json.dumps({
    "summary": result.summary,
    "progress": progress,
    "growth": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak,
    "child_peak": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss,
}))
"""


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> DivergenceStage:
    """Give the stage of a build that is assembled."""
    tmp_path = tmp_path_factory.mktemp("apart")
    recipe = tmp_path / "apart.yaml"
    recipe.write_text(RECIPE)
    spec = BuildSpec(
        recipe=str(recipe), source=str(tiny_glm_path()), workspace=str(tmp_path / "work")
    )
    build = Build(spec)
    build.workspace.create()
    for each in (PlanStage(build), QuantizeStage(build, 0), AssembleStage(build)):
        each.run(quiet)
    return DivergenceStage(build)


def start_parity(stage: DivergenceStage) -> subprocess.Popen[str]:
    """Start the parity stage of the same build in a process like the flow's."""
    spec = stage.build.spec.model_dump_json()
    return subprocess.Popen(
        [sys.executable, "-c", PARITY, spec],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=users_environment(),
    )


def runs(pid: int) -> bool:
    """Whether a process runs: one that has ended and whose parent has not asked does not."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return state.stdout.strip()[:1] not in ("", "Z")


def quiet(_done: int, _total: int) -> None:
    pass


class Noted(subprocess.Popen[str]):
    """A process as ever, whose start is noted."""

    started: ClassVar[list[subprocess.Popen[str]]] = []

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        Noted.started.append(self)


def test_a_killed_comparison_is_an_error_and_goes_on_at_its_layer(
    stage: DivergenceStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system's kill, as when memory runs out, fails the stage; the next run loses a layer."""
    monkeypatch.setattr(subprocess, "Popen", Noted)
    told: list[int] = []

    def kill_in_the_middle(done: int, _total: int) -> None:
        told.append(done)
        if done == 2:
            Noted.started[-1].kill()

    with pytest.raises(EvaluationError, match=r"compares the build .* killed by signal 9"):
        stage.run(kill_in_the_middle)
    assert Noted.started[-1].returncode == -signal.SIGKILL
    assert stage.current() is None
    failure = stage.build.workspace.records / "failure.json"
    assert "killed by signal 9" in failure.read_text()
    again: list[int] = []
    stage.run(lambda done, _total: again.append(done))
    assert again[0] > told[0]
    assert stage.current() is not None
    assert not failure.exists()


def test_parity_takes_no_memory_of_the_flow(stage: DivergenceStage) -> None:
    """What it loads is gone when it ends; its progress and its log come through, layer by layer."""
    stage.build.workspace.records.joinpath("parity.json").unlink(missing_ok=True)
    flow = start_parity(stage)
    printed, logged = flow.communicate(timeout=300)
    assert flow.returncode == 0, logged
    answer = json.loads(printed.splitlines()[-1])
    assert answer["summary"].startswith("5 layers, largest error ")
    assert answer["progress"] == [[done, 6] for done in range(1, 7)]
    assert "INFO:glm_quant.parity.stream:parity: layer 5 of 5, attention " in logged
    assert answer["growth"] < answer["child_peak"] / 8


def test_a_killed_flow_leaves_no_process(stage: DivergenceStage) -> None:
    """Not even the system's kill leaves one behind that holds the weights."""
    stage.build.workspace.records.joinpath("parity.json").unlink(missing_ok=True)
    flow = start_parity(stage)
    assert flow.stdout is not None
    child = int(flow.stdout.readline())
    assert runs(child)
    flow.kill()
    flow.communicate()
    deadline = time.monotonic() + 120
    while runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_an_error_in_the_child_keeps_its_kind_and_words(tmp_path: Path) -> None:
    """So that what can pass is tried again, and the command exits as it should."""
    request = DivergenceRequest(
        source=str(tmp_path / "none"),
        folder=tmp_path,
        checkpoint=tmp_path,
        settings=DivergenceSettings(),
    )
    with pytest.raises(SourceError, match=r"^\S+/none: there is no such folder"):
        run_in_child(DIVERGENCE_JOB, request, "it")


def test_a_build_is_measured_as_its_users_run_it() -> None:
    """The proof beside it multiplies more exactly than MLX does unasked; the child does not."""
    assert os.environ["MLX_ENABLE_TF32"] == "0"  # set by the proof, in this process
    answer = run_in_child(JOB, Question(), "it")
    assert answer.switch == users_environment().get("MLX_ENABLE_TF32")
