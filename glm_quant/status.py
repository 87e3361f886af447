"""What is done in a workspace, what is left, what failed: read from its records alone."""

import fcntl
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from glm_quant.errors import InputError
from glm_quant.stages.base import FAILURE_NAME, Failure
from glm_quant.stages.plan import PlanRecord
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
    """

    model_config = ConfigDict(frozen=True)

    workspace: str
    recipe: str
    running: str | None
    stages: list[StageStatus]
    done_bytes: int
    total_bytes: int
    failure: Failure | None


def read_status(root: Path) -> WorkspaceStatus:
    """Read a workspace.

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
    plan = record.plan
    done = [
        shard
        for shard in plan.shards
        if (workspace.records / "shards" / f"{shard.name}.json").is_file()
        and _has_size(workspace.checkpoint / shard.name, shard.size_bytes)
    ]
    stages: list[StageStatus] = []
    for stage in STAGES:
        if stage == "calibrate" and not plan.calibrates:
            continue
        if stage == "quantize":
            stages.append(StageStatus(stage=stage, done=len(done), total=len(plan.shards)))
        else:
            found = len(list(workspace.records.glob(f"{stage}*.json")))
            stages.append(StageStatus(stage=stage, done=found, total=max(found, 1)))
    return WorkspaceStatus(
        workspace=str(root),
        recipe=plan.recipe,
        running=_holder(workspace.root / ".lock"),
        stages=stages,
        done_bytes=sum(shard.size_bytes for shard in done),
        total_bytes=sum(shard.size_bytes for shard in plan.shards),
        failure=_failure(workspace.records / FAILURE_NAME),
    )


def _has_size(path: Path, size_bytes: int) -> bool:
    return path.is_file() and path.stat().st_size == size_bytes


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
