"""The stages of a build, each one idempotent on its record.

A stage knows its fingerprint before it runs: the hash of everything that decides its result. If the
record on disk has it and the outputs are there, the stage is done, whoever did it and whenever;
else it is made. Prefect shows this, it does not decide it.
"""

import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict

from glm_quant.artifact import Record, write_atomic
from glm_quant.build import Build
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.quantize.convert import Progress

FAILURE_NAME = "failure.json"
ASSESS_STAGES = ("verify", "parity", "divergence", "evaluate")
# The records that speak of one assembled build.
PROOFS = ("parity", "divergence", "evaluate", "card")

R = TypeVar("R", bound=Record)


class StageResult(BaseModel):
    """What a stage tells the outside: small, plain, without paths of this machine.

    Attributes:
        stage: its name.
        fingerprint: of its inputs.
        summary: one line for a person.
        seconds: how long it took now; zero when nothing had to be done.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    fingerprint: str
    summary: str
    seconds: float = 0.0


class Failure(BaseModel):
    """Why the last run stopped; removed when the stage succeeds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    stage: str
    error: str
    message: str


def shard_title(build: Build, shard: int) -> str:
    """Return "03 of 46" for an output shard."""
    total = len(build.plan.shards)
    return f"{shard + 1:0{len(str(total))}d} of {total}"


class Stage(ABC, Generic[R]):
    """One stage of one build."""

    name: str
    record_type: type[R]
    # Whether its failure is the run's: a stage beside the run's own course says nothing.
    tells_failure = True
    # Stages whose records speak of this one's result: another result makes them void.
    decides: tuple[str, ...] = ()

    def __init__(self, build: Build) -> None:
        """Attach to a build."""
        self.build = build

    @property
    def record_path(self) -> Path:
        """Where the record stands."""
        return self.build.workspace.records / f"{self.name}.json"

    @property
    def root(self) -> Path:
        """What the record's outputs are relative to."""
        return self.build.workspace.root

    @property
    def title(self) -> str:
        """What a person calls this stage, or the part of it that this is."""
        return self.name

    @abstractmethod
    def inputs(self) -> Canonical:
        """Return everything that decides the result."""

    @abstractmethod
    def make(self, progress: Progress) -> R:
        """Do the work; returns the record, which `keep` saves."""

    @abstractmethod
    def summarize(self, record: R) -> str:
        """Return one line for a person."""

    def fingerprint(self) -> str:
        """Return the hash of the inputs."""
        return fingerprint({"stage": self.name, "inputs": self.inputs()})

    def current(self) -> R | None:
        """Return the record if it is today's and its outputs are there."""
        record = self.record_type.load(self.record_path)
        if record is None or record.fingerprint != self.fingerprint():
            return None
        return record if self.is_whole(record) else None

    def is_whole(self, record: R) -> bool:
        """Whether the record's outputs are where they should be: cheap, does not read them."""
        return record.is_whole(self.root)

    def keep(self, record: R) -> None:
        """Write the record: the stage is done from here on.

        What was said of another result goes first, so that no card can mix two builds' records.
        """
        earlier = self.record_type.load(self.record_path)
        if earlier is not None and earlier.fingerprint != record.fingerprint:
            for name in self.decides:
                (self.build.workspace.records / f"{name}.json").unlink(missing_ok=True)
        record.save(self.record_path)

    def run(self, progress: Progress) -> StageResult:
        """Do what is left to do.

        Raises:
            BusyError: another machine has taken the build over.
            GlmQuantError: whatever the stage stops at; `failure.json` says it too.
        """
        self.build.require_held()
        begin = time.monotonic()
        record = self.current()
        failure = self.build.workspace.records / FAILURE_NAME
        if record is None:
            try:
                record = self.make(progress)
            except Exception as error:
                report = Failure(stage=self.name, error=type(error).__name__, message=str(error))
                if self.tells_failure:
                    write_atomic(failure, (report.model_dump_json(indent=2) + "\n").encode())
                raise
            self.keep(record)
            if self.tells_failure:
                failure.unlink(missing_ok=True)
        return StageResult(
            stage=self.name,
            fingerprint=record.fingerprint,
            summary=self.summarize(record),
            seconds=round(time.monotonic() - begin, 3),
        )
