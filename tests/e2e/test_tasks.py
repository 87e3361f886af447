"""Tasks as Prefect runs them, against an API in this process's place: no worker, no deployment."""

import threading
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub
import pytest
from prefect import flow
from prefect.testing.utilities import prefect_test_harness

from flows.environment import prepare
from glm_quant.build import BuildSpec, open_build
from glm_quant.hub.retry import Patience
from glm_quant.stages.publishing import UploadStage
from glm_quant.testbed import tiny_glm_path
from tasks.session import at_work
from tasks.upload import make_shards
from tests.e2e.service import wait_for
from tests.hub_server import Fault, HubServer

TOKEN = "hf_PlantedTokenOfTheTasks"
HERE, AWAY = "hf://org/here", "hf://org/away"
RECIPE = """\
name: sent
description: three shards, to be sent
shard_bytes: 1_500_000
rules:
  - {group: mtp, drop: true}
  - {match: ".", dtype: source}
publish:
  license: psf-2.0
"""


@pytest.fixture(scope="module", autouse=True)
def api() -> Iterator[None]:
    """Prefect's API with a database of its own."""
    prepare()
    with prefect_test_harness(server_startup_timeout=180):
        yield


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with HubServer(token=TOKEN) as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield running


@pytest.fixture
def spec(tmp_path: Path) -> BuildSpec:
    recipe = tmp_path / "sent.yaml"
    recipe.write_text(RECIPE)
    return BuildSpec(
        recipe=str(recipe),
        source=str(tiny_glm_path()),
        workspace=str(tmp_path / "work"),
        targets=(AWAY, HERE),
    )


def give_up_after(monkeypatch: pytest.MonkeyPatch, tries: int) -> None:
    patience = Patience(tries=tries, first_seconds=0.05, longest_seconds=0.05)
    monkeypatch.setattr("glm_quant.hub.repository.Patience", lambda: patience)


@flow(name="send")
def send(spec: BuildSpec) -> None:
    with at_work(spec):
        make_shards(spec)


def sent(spec: BuildSpec, target: str) -> list[int]:
    """The shards that a target has, by the records."""
    build = open_build(spec)
    shards = range(len(build.plan.shards))
    return [i for i in shards if UploadStage(build, i, target).current()]


def test_a_target_that_is_away_holds_up_nothing(
    hub: HubServer, spec: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards are made and sent elsewhere meanwhile; once it is back it gets them all."""
    give_up_after(monkeypatch, 100_000)
    hub.fault(Fault("status", "org/away", times=1_000_000))
    run = threading.Thread(target=send, args=(spec,), daemon=True)
    run.start()
    shards = list(range(len(open_build(spec).plan.shards)))
    assert len(shards) > 2
    wait_for(lambda: sent(spec, HERE) == shards, "the target that answers lacks shards")
    assert sent(spec, AWAY) == []
    hub.faults.clear()
    run.join(60)
    assert sent(spec, AWAY) == shards


def test_a_target_that_fails_is_told_and_left_to_publishing(
    hub: HubServer,
    spec: BuildSpec,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run goes on; the failed task stands in the UI and the log says what is missing."""
    give_up_after(monkeypatch, 2)
    hub.fault(Fault("status", "org/away", times=1_000_000))
    send(spec)
    shards = list(range(len(open_build(spec).plan.shards)))
    assert sent(spec, HERE) == shards
    assert sent(spec, AWAY) == []
    assert f"{AWAY} lacks {len(shards)} shards; publishing sends them again" in caplog.text
