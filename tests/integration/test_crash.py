"""Real processes that are killed, stopped or put to sleep while they convert from a Hub."""

import os
import random
import signal
import time
from collections.abc import Generator
from pathlib import Path

import pytest

from glm_quant.data import tiny_glm_path
from glm_quant.workspace import workspace_beside
from tests.benchmarks.crash import REPO, contents, crash, write_source
from tests.benchmarks.forks import Forks, Run
from tests.hub_server import HubServer
from tests.plain import PLAIN

SLOW = 6_000_000  # bytes per second and connection: a run takes seconds


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Generator[tuple[HubServer, Path]]:
    """Give a Hub with a source of 15 shards, and a recipe."""
    folder = tmp_path_factory.mktemp("crash")
    recipe = write_source(folder, layers=4, experts=12)
    with HubServer() as hub:
        hub.add_folder(REPO, folder / "source")
        yield hub, recipe


@pytest.fixture(scope="module")
def forks(served: tuple[HubServer, Path]) -> Generator[Forks]:
    with Forks({"HF_ENDPOINT": served[0].url}) as running:
        yield running


@pytest.fixture
def hub(served: tuple[HubServer, Path]) -> Generator[HubServer]:
    yield served[0]
    served[0].rate = None


@pytest.fixture(scope="module")
def expected(
    forks: Forks, served: tuple[HubServer, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """Give the files of a build that nothing disturbed."""
    output = tmp_path_factory.mktemp("plain") / "build"
    run = start(forks, served[1], output)
    assert run.wait() == 0, run.said
    return contents(output)


def start(forks: Forks, recipe: Path, output: Path) -> Run:
    options = ["--source", f"hf://{REPO}", "--recipe", str(recipe), "--output", str(output)]
    return forks.start(["convert", *options], output)


def recorded(output: Path) -> set[str]:
    """Return which output shards are finished."""
    records = output.with_name(f".{output.name}.glm-quant") / "records" / "shards"
    return {path.stem for path in records.glob("model-*.json")}


def wait_for_a_finished_shard(run: Run, output: Path) -> None:
    """Return while a run converts: one output shard is recorded, others are not."""
    end = time.monotonic() + 300
    while not recorded(output):
        assert not run.has_ended(), run.said
        assert time.monotonic() < end, run.said
        time.sleep(0.01)


def written(run: Run) -> dict[tuple[str, int], int]:
    """Return the bytes that a run wrote to output shards, by place; their headers do not count."""
    return {
        (step.file.removesuffix(".part"), step.offset): step.size_bytes
        for step in run.steps
        if step.operation == "write" and step.offset > 0
    }


def test_killed_at_random_moments(
    forks: Forks, served: tuple[HubServer, Path], tmp_path: Path
) -> None:
    """kill -9 ten times: same bytes, no more than a shard's work again, no whole shard fetched."""
    seed = int(os.environ.get("GLM_QUANT_TEST_SEED", "0")) or random.randrange(1, 10**6)
    print(f"seed {seed}: GLM_QUANT_TEST_SEED={seed} chooses the same moments")
    report = crash(forks, served[0], tmp_path, served[1], kills=10, seed=seed)
    assert report.is_good, report.figures()
    assert report.kills == 10
    assert len(report.kills_by_stage) >= 2, report.figures()


def test_killed_while_one_pass_converts(
    forks: Forks, served: tuple[HubServer, Path], tmp_path: Path
) -> None:
    """kill -9 again and again while it calibrates and converts: the same bytes, on one worker too.

    They are those of a conversion from a folder, which is calibrated first.
    """
    served[0].add_folder("org/tiny", tiny_glm_path())
    recipe = tmp_path / "gptq.yaml"
    rules = Path(PLAIN).read_text().replace("quantizer: search", "quantizer: gptq")
    recipe.write_text(f"{rules}calibration: {{tokens: 64, context: 64}}\n")

    def begin(output: Path, source: str, *more: str) -> Run:
        options = ["--source", source, "--recipe", str(recipe), "--output", str(output)]
        return forks.start(["convert", *options, *more], output)

    plain = begin(tmp_path / "plain", str(tiny_glm_path()))
    output = tmp_path / "build"
    calibration = workspace_beside(output).calibration
    chance = random.Random(7)
    for layer in (0, 1, 2):
        run = begin(output, "hf://org/tiny", "--workers", "1")
        end = time.monotonic() + 300
        # What is made of a layer stays until all of them are made.
        while not list(calibration.rglob(f"energies-{layer:03d}.json")):
            assert not run.has_ended(), run.said
            assert time.monotonic() < end, run.said
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.3))
        run.signal(signal.SIGKILL)
        assert run.wait() in (-signal.SIGKILL, 0)  # a loaded machine may be too late
    last = begin(output, "hf://org/tiny", "--workers", "1")
    for run in (plain, last):
        assert run.wait() == 0, run.said
    made, expected = contents(output), contents(tmp_path / "plain")
    del made["manifest.json"], expected["manifest.json"]  # says where the source is
    assert made == expected


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_by_a_signal(
    forks: Forks,
    served: tuple[HubServer, Path],
    hub: HubServer,
    expected: dict[str, str],
    tmp_path: Path,
    number: int,
    code: int,
) -> None:
    """It ends with one clear line, keeps what is done, and goes on from there."""
    output = tmp_path / "build"
    hub.rate = SLOW
    run = start(forks, served[1], output)
    wait_for_a_finished_shard(run, output)
    run.signal(number)
    assert run.wait() == code, run.said
    assert "Stopped" in run.said
    assert "the same command goes on" in " ".join(run.said.split())
    assert "Traceback" not in run.said
    hub.rate = None
    shards = recorded(output)
    again = start(forks, served[1], output)
    assert again.wait() == 0, again.said
    assert contents(output) == expected
    assert not {shard for shard, _ in written(again)} & shards
    twice = sum(size for place, size in written(again).items() if place in written(run))
    assert twice <= max(path.stat().st_size for path in output.glob("*.safetensors"))


def test_a_machine_that_sleeps(
    forks: Forks,
    served: tuple[HubServer, Path],
    hub: HubServer,
    expected: dict[str, str],
    tmp_path: Path,
) -> None:
    """The process stands still while every connection is lost; then it goes on by itself."""
    output = tmp_path / "build"
    hub.rate = SLOW
    run = start(forks, served[1], output)
    wait_for_a_finished_shard(run, output)
    run.signal(signal.SIGSTOP)
    hub.hang_up()
    hub.rate = None
    time.sleep(0.5)
    assert not run.has_ended()
    run.signal(signal.SIGCONT)
    assert run.wait() == 0, run.said
    assert contents(output) == expected
    cut = [r for r in hub.requests("^/cdn/") if r.range and not r.range.startswith("bytes=0-")]
    assert cut, "no download was cut"
