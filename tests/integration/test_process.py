"""Measurements in processes of their own: what they raise, and that their end is not the flow's."""

import os
import signal
import subprocess
from pathlib import Path
from typing import Any, ClassVar

import pytest

from glm_quant.build import BuildSpec, open_build
from glm_quant.data import tiny_glm_path
from glm_quant.errors import EvaluationError, SourceError
from glm_quant.evaluation.process import run_apart
from glm_quant.model.precision import users_environment
from glm_quant.settings import DivergenceSettings
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.divergence import DivergenceStage
from glm_quant.stages.divergence_worker import DivergenceRequest
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.quantize import QuantizeStage
from tests.switch_worker import Answer

RECIPE = """\
name: apart
description: As quick as it gets
rules:
  - {group: mtp, drop: true}
  - {group: [norms, router, indexer], dtype: source}
  - {match: .*, bits: 4}
# Half a second a layer: long enough for a kill to come in mid-run on a busy machine.
divergence: {tokens: 2048, context: 64}
"""


@pytest.fixture
def stage(tmp_path: Path) -> DivergenceStage:
    """Give the stage of a build that is assembled."""
    recipe = tmp_path / "apart.yaml"
    recipe.write_text(RECIPE)
    spec = BuildSpec(
        recipe=str(recipe), source=str(tiny_glm_path()), workspace=str(tmp_path / "work")
    )
    build = open_build(spec, afresh=True)
    build.workspace.create()
    for each in (PlanStage(build), QuantizeStage(build, 0), AssembleStage(build)):
        each.run(quiet)
    return DivergenceStage(build)


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


def test_an_error_in_the_child_keeps_its_kind_and_words(tmp_path: Path) -> None:
    """So that what can pass is tried again, and the command exits as it should."""
    request = DivergenceRequest(
        source=str(tmp_path / "none"),
        folder=tmp_path,
        checkpoint=tmp_path,
        settings=DivergenceSettings(),
    )
    with pytest.raises(SourceError, match=r"^\S+/none: there is no such folder"):
        run_apart("glm_quant.stages.divergence_worker", request, "it", None)


def test_a_build_is_measured_as_its_users_run_it() -> None:
    """The proof beside it multiplies more exactly than MLX does unasked; the child does not."""
    assert os.environ["MLX_ENABLE_TF32"] == "0"  # set by the proof, in this process
    answer = run_apart("tests.switch_worker", Answer(), "it", None)
    users = users_environment().get("MLX_ENABLE_TF32")
    assert Answer.model_validate_json(answer).switch == users
