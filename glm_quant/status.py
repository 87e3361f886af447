"""What is done in a workspace, what is left, what failed."""

import fcntl
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from glm_quant.build import Build, BuildSpec
from glm_quant.errors import GlmQuantError, InputError
from glm_quant.litter import entries
from glm_quant.ownership import Owner
from glm_quant.quantize.records import RemoteShard
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.base import FAILURE_NAME, Failure, Stage
from glm_quant.stages.calibrate import CalibrateStage
from glm_quant.stages.card import CardStage
from glm_quant.stages.divergence import DivergenceStage
from glm_quant.stages.download import DownloadStage
from glm_quant.stages.evaluate import EvaluationStage
from glm_quant.stages.parity import ParityStage
from glm_quant.stages.plan import PlannedFile, PlanRecord, PlanStage, plan_figures
from glm_quant.stages.publish import PublishRecord, PublishStage
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.workspace import Workspace

STAGES = (
    "download",
    "plan",
    "calibrate",
    "quantize",
    "assemble",
    "parity",
    "divergence",
    "evaluate",
    "card",
    "publish",
)


_STAGES: dict[str, type[Stage[Any]]] = {
    stage.name: stage
    for stage in (
        DownloadStage,
        PlanStage,
        CalibrateStage,
        AssembleStage,
        ParityStage,
        DivergenceStage,
        EvaluationStage,
        CardStage,
    )
}


class StageStatus(BaseModel):
    """One stage: how many of its parts are done."""

    model_config = ConfigDict(frozen=True)

    stage: str
    done: int
    total: int


class WorkspaceStatus(BaseModel):
    """A workspace at a glance.

    Attributes:
        running: process number of the run that works here now, if one does.
        failure: why the last run stopped, if it failed.
        unchecked: why the records were not compared with what a run would make now, if they were
            not: what is done is then what was done.
    """

    model_config = ConfigDict(frozen=True)

    workspace: str
    recipe: str
    running: str | None
    stages: list[StageStatus]
    done_bytes: int
    total_bytes: int
    failure: Failure | None
    unchecked: str | None = None


def read_status(root: Path) -> WorkspaceStatus:
    """Read a workspace: what a run would find done in it, where recipe and source are at hand.

    Raises:
        InputError: the folder is no workspace, or nothing was planned in it yet.
    """
    workspace = Workspace(root.expanduser().absolute())
    record = PlanRecord.load(workspace.records / "plan.json")
    if record is None:
        raise InputError(
            f"{root}: nothing was planned here yet. Give the folder that `glm-quant run` got as "
            "--workspace."
        )
    build, unchecked = _open(workspace)
    plan = record.plan if build is None else plan_figures(build)
    finished = [
        shard
        for number, shard in enumerate(plan.shards)
        if (
            _is_recorded(workspace, shard)
            if build is None
            else _is_current(QuantizeStage(build, number))
        )
    ]
    stages: list[StageStatus] = []
    for name in STAGES:
        if name == "calibrate" and not plan.calibrates:
            continue
        if name == "quantize":
            done, total = len(finished), len(plan.shards)
        else:
            done, total = _count(workspace, build, name)
        stages.append(StageStatus(stage=name, done=done, total=total))
    return WorkspaceStatus(
        workspace=str(root),
        recipe=plan.recipe,
        running=_holder(workspace.root / ".lock"),
        stages=stages,
        done_bytes=sum(shard.size_bytes for shard in finished),
        total_bytes=sum(shard.size_bytes for shard in plan.shards),
        failure=_failure(workspace.records / FAILURE_NAME),
        unchecked=unchecked,
    )


def _open(workspace: Workspace) -> tuple[Build | None, str | None]:
    """Open the build as the last run did, or return why not; nothing is written or waited for."""
    owner = Owner.load(workspace)
    if owner is None or not owner.spec:
        return None, "it does not say how it was asked for"
    try:
        spec = BuildSpec.model_validate(owner.spec)
    except ValidationError:
        return None, "it was asked for with another version of glm-quant"
    if spec.source is None or "://" in spec.source.removeprefix("file://"):
        return None, f"{spec.source} is not asked"
    try:
        return Build(spec), None
    except GlmQuantError as error:
        return None, str(error)


def _count(workspace: Workspace, build: Build | None, name: str) -> tuple[int, int]:
    """Return how many of a stage's parts are done, and how many there are."""
    paths = entries(workspace.records, f"{name}*.json")
    if build is None:
        return len(paths), max(len(paths), 1)
    if name != PublishStage.name:
        return int(_is_current(_STAGES[name](build))), 1
    published = [record.target for path in paths if (record := PublishRecord.load(path))]
    targets = dict.fromkeys((*build.targets, *published))
    done = sum(_is_published(PublishStage(build, target)) for target in targets)
    return done, max(len(targets), 1)


def _is_current(stage: Stage[Any]) -> bool:
    try:
        return stage.current() is not None
    except GlmQuantError:  # what it depends on is not there
        return False


def _is_published(stage: PublishStage) -> bool:
    """Whether a target was given what stands here now; only a folder is looked at."""
    record = PublishRecord.load(stage.record_path)
    try:
        current = record is not None and record.fingerprint == stage.fingerprint()
    except GlmQuantError:
        return False
    return current and record is not None and record.is_whole(stage.root)


def _is_recorded(workspace: Workspace, shard: PlannedFile) -> bool:
    """Whether a shard was finished, and is here or was left to the targets that have it."""
    if not (workspace.shard_records / f"{shard.name}.json").is_file():
        return False
    path = workspace.checkpoint / shard.name
    if path.is_file():
        return path.stat().st_size == shard.size_bytes
    return RemoteShard.load(workspace.shard_records / f"{shard.name}.elsewhere.json") is not None


def _holder(lock: Path) -> str | None:
    """Return who holds the lock, by trying to take it for a moment."""
    if not lock.is_file():
        return None
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return file.read().strip()
    return None


def _failure(path: Path) -> Failure | None:
    try:
        return Failure.model_validate_json(path.read_bytes())
    except (FileNotFoundError, ValidationError):
        return None
