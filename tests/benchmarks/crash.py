"""kill -9 at random moments of `glm-quant convert` from a Hub, and the same command again.

    uv run python -m tests.benchmarks.crash --kills 100

The source comes from a Hub on loopback. Half of the moments are operations on files, drawn evenly
over stages and kinds of operation (a write is torn in the middle), the others are points in time.
After each kill the command is run again, to be killed again or to finish. What comes out is
compared byte by byte with an uninterrupted run. Reported: kills by stage, the bytes that were
encoded and written again because of each kill, and shards that stood whole on disk and were
fetched again.
"""

import argparse
import hashlib
import json
import random
import shutil
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.benchmarks.forks import Forks, Moment, Run, Step
from tests.hub_server import HubServer
from tests.synthetic import small_config, write_checkpoint

REPO = "org/crash"
HEAD_RANGE = "bytes=0-262143"  # the header, which every run reads

RECIPE = """\
name: crash
description: several output shards from many source shards
shard_bytes: {shard_bytes}
rules:
  - group: routed_experts
    bits: 2
  - group: [attention, shared_experts, dense_mlp]
    bits: 4
  - group: [embeddings, lm_head]
    bits: 6
  - group: [router, norms, indexer]
    dtype: source
  - group: mtp
    drop: true
"""

# Which run wrote how many bytes last, by output shard and offset.
Written = dict[tuple[str, int], tuple[int, int]]


@dataclass
class Report:
    """What happened.

    Attributes:
        conversions: begun and finished; each was killed once or more.
        kills_by_stage: what the process was doing on a file when it died.
        redone_bytes: for each kill, the bytes of output that were written again because of it.
        largest_shard_bytes: of the output.
        fetched_again: source shards that stood whole on disk at a kill and were asked for again.
        mismatches: files that differ from those of an uninterrupted run.
        unwritten_bytes: bytes of the output that no recorded write explains: else we measure wrong.
    """

    seed: int
    conversions: int = 0
    kills_by_stage: Counter[str] = field(default_factory=Counter[str])
    kills_by_operation: Counter[str] = field(default_factory=Counter[str])
    redone_bytes: list[int] = field(default_factory=list[int])
    largest_shard_bytes: int = 0
    output_bytes: int = 0
    fetched_again: list[str] = field(default_factory=list[str])
    mismatches: list[str] = field(default_factory=list[str])
    unwritten_bytes: int = 0
    seconds: float = 0.0

    @property
    def kills(self) -> int:
        """How many processes were killed."""
        return self.kills_by_stage.total()

    @property
    def is_good(self) -> bool:
        """Whether everything is as promised."""
        return not (
            self.mismatches
            or self.fetched_again
            or self.unwritten_bytes
            or max(self.redone_bytes, default=0) > self.largest_shard_bytes
        )

    def figures(self) -> dict[str, Any]:
        """Return what to print."""
        redone = self.redone_bytes or [0]
        return {
            "seed": self.seed,
            "kills": self.kills,
            "conversions": self.conversions,
            "kills_by_stage": dict(self.kills_by_stage.most_common()),
            "kills_by_operation": dict(self.kills_by_operation.most_common()),
            "redone_bytes_max": max(redone),
            "redone_bytes_mean": round(sum(redone) / len(redone)),
            "largest_shard_bytes": self.largest_shard_bytes,
            "output_bytes": self.output_bytes,
            "fetched_again": self.fetched_again,
            "mismatches": self.mismatches,
            "unwritten_bytes": self.unwritten_bytes,
            "seconds": round(self.seconds, 1),
            "good": self.is_good,
        }


class Crashes:
    """Conversions of one source, killed again and again."""

    def __init__(self, forks: Forks, hub: HubServer, work: Path, recipe: Path, seed: int) -> None:
        """Make the uninterrupted build that all others are held against."""
        self._forks, self._hub, self._work, self._recipe = forks, hub, work, recipe
        self._chance = random.Random(seed)
        self.report = Report(seed)
        plain = work / "plain"
        begin = time.monotonic()
        run = self.start(plain)
        if run.wait():
            raise SystemExit(f"the uninterrupted run failed: {run.said}")
        self._plain_seconds = time.monotonic() - begin
        kinds = Counter((step.stage, step.operation) for step in run.steps)
        self._operations: dict[str, list[tuple[str, int]]] = {}
        for (stage, operation), count in kinds.items():
            self._operations.setdefault(stage, []).append((operation, count))
        self._expected = contents(plain)
        shards = [path.stat().st_size for path in plain.glob("*.safetensors")]
        self.report.largest_shard_bytes = max(shards)
        self.report.output_bytes = sum(shards)

    def start(self, output: Path, kill_at: Moment | None = None) -> Run:
        """Start `glm-quant convert`."""
        arguments = ["convert", "--source", f"hf://{REPO}", "--recipe", str(self._recipe)]
        return self._forks.start([*arguments, "--output", str(output)], output, kill_at)

    def convert(self, most_kills: int) -> None:
        """Make one conversion, killed up to so many times."""
        output = self._work / f"build-{self.report.conversions}"
        written: Written = {}
        redone: list[int] = []
        whole: set[str] = set()
        while True:
            asked_before = len(self._hub.log)
            run = self._killed(output) if len(redone) < most_kills else self.start(output)
            status, steps = run.wait(), run.steps
            if status not in (0, -9):
                raise SystemExit(f"a run ended with {status}: {run.said}")
            self._look_for_waste(asked_before, whole)
            _account(steps, len(redone), written, redone)
            if status == 0:
                break
            self.report.kills_by_stage[steps[-1].stage if steps else "open"] += 1
            self.report.kills_by_operation[steps[-1].operation if steps else "none"] += 1
            redone.append(0)
            whole = _whole_sources(output)
        self.report.conversions += 1
        self.report.redone_bytes += redone
        self._compare(output, written)
        shutil.rmtree(output)
        shutil.rmtree(output.with_name(f".{output.name}.glm-quant"))

    def _killed(self, output: Path) -> Run:
        """Run until a random moment, or to the end if that comes first."""
        if self._chance.random() < 0.5:
            stage = self._chance.choice(sorted(self._operations))
            operation, count = self._chance.choice(self._operations[stage])
            return self.start(output, (stage, operation, self._chance.randint(1, count)))
        run = self.start(output)
        end = time.monotonic() + self._chance.uniform(0, self._plain_seconds)
        while time.monotonic() < end and not run.has_ended():
            time.sleep(0.005)
        if not run.has_ended():
            run.signal(9)
        return run

    def _look_for_waste(self, asked_before: int, whole: set[str]) -> None:
        for request in self._hub.log[asked_before:]:
            again = request.path.startswith("/cdn/") and request.file in whole
            if again and request.range != HEAD_RANGE:
                self.report.fetched_again.append(f"{request.file} {request.range}")

    def _compare(self, output: Path, written: Written) -> None:
        found = contents(output)
        names = found.keys() | self._expected.keys()
        wrong = sorted(name for name in names if found.get(name) != self._expected.get(name))
        self.report.mismatches += [f"{output.name}/{name}" for name in wrong]
        for path in output.glob("*.safetensors"):
            places = {at: size for (name, at), (_, size) in written.items() if name == path.name}
            header = min(places, default=0)
            self.report.unwritten_bytes += path.stat().st_size - header - sum(places.values())


def _whole_sources(output: Path) -> set[str]:
    """Return the source shards that stand whole on disk."""
    source = output.with_name(f".{output.name}.glm-quant") / "source"
    return {path.name.partition("-")[2] for path in source.glob("*.safetensors")}


def _account(steps: list[Step], run: int, written: Written, redone: list[int]) -> None:
    """Charge what a run wrote again to the kill of the run that had written it before."""
    for step in steps:
        if step.operation == "write" and step.offset > 0:  # at 0 stands the header
            place = (step.file.removesuffix(".part"), step.offset)
            before, _ = written.get(place, (run, 0))
            if before < run:
                redone[before] += step.size_bytes
            written[place] = (run, step.size_bytes)


def contents(folder: Path) -> dict[str, str]:
    """Return the sha256 of every file of a folder by its name."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.iterdir())
    }


def write_source(folder: Path, layers: int, experts: int) -> Path:
    """Write source and recipe; returns the recipe."""
    dims = {"hidden_size": 512, "moe_intermediate_size": 256, "vocab_size": 2048}
    config = small_config(layers, experts) | dims
    write_checkpoint(folder / "source", config, shard_bytes=6_000_000)
    recipe = folder / "crash.yaml"
    recipe.write_text(RECIPE.format(shard_bytes="3_000_000"))
    return recipe


def crash(forks: Forks, hub: HubServer, work: Path, recipe: Path, kills: int, seed: int) -> Report:
    """Kill so many processes.

    Args:
        forks: starts them, with the Hub's address.
        hub: serves the source as REPO.
        work: a folder to build in.
        recipe: of the builds.
        kills: how many.
        seed: decides the moments (those in time depend on the machine too).
    """
    begin = time.monotonic()
    crashes = Crashes(forks, hub, work, recipe, seed)
    chance = random.Random(seed + 1)
    while crashes.report.kills < kills:
        crashes.convert(min(chance.randint(1, 6), kills - crashes.report.kills))
    crashes.report.seconds = time.monotonic() - begin
    return crashes.report


def main() -> None:
    """Kill and print one JSON value."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--experts", type=int, default=24)
    parser.add_argument("--seed", type=int, default=random.randrange(1, 10**6))
    parser.add_argument("--folder", type=Path, help="default: a new one under the system's")
    options = parser.parse_args()
    work = Path(tempfile.mkdtemp(prefix="crash-", dir=options.folder))
    try:
        recipe = write_source(work, options.layers, options.experts)
        with HubServer() as hub, Forks({"HF_ENDPOINT": hub.url}) as forks:
            hub.add_folder(REPO, work / "source")
            report = crash(forks, hub, work, recipe, options.kills, options.seed)
        print(json.dumps(report.figures(), indent=2))
    finally:
        shutil.rmtree(work)
    raise SystemExit(not report.is_good)


if __name__ == "__main__":
    main()
