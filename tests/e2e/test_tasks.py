"""Tasks and flows at a running server, in this process: without the seconds that a worker takes."""

import signal
import threading
import time
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from uuid import UUID, uuid4

import huggingface_hub
import pytest
from prefect import flow, task
from prefect.artifacts import Artifact
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)
from prefect.states import AwaitingRetry, Crashed, Running
from prefect.variables import Variable

from deployments.restarts import RESTART_TAG, close_crashed, restart_crashed
from flows.watch import watch
from glm_quant.build import Build, BuildSpec
from glm_quant.data import tiny_glm_path
from glm_quant.hub.retry import Patience
from glm_quant.quantize.convert import Progress, ShardRecord
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.stages.upload import UploadStage
from tasks.session import build_session
from tasks.upload import make_shards, restore_shards
from tasks.upstream import Look, Watched, WatchSpec, look, variable_name
from tests.e2e.conftest import UPSTREAM
from tests.e2e.service import Server, wait_for
from tests.hub_server import Content, Fault, HubServer

pytestmark = pytest.mark.slow

TOKEN = "hf_PlantedTokenOfTheTasks"
HERE, AWAY = "hf://org/here", "hf://org/away"
RECIPE = """\
name: sent
description: a few shards, to be sent
shard_bytes: 1_500_000
rules:
  - {group: mtp, drop: true}
  - {match: ".", dtype: source}
publish:
  license: psf-2.0
  acknowledge_license: 3b2f81fe21d181c499c59a256c8e1968455d6689d269aa85373bfb6af41da3bf
"""


@pytest.fixture(autouse=True)
def at_server(server: Server) -> Iterator[None]:
    # Log lines that are still to be sent would look for the server after its end, for a minute.
    settings = {PREFECT_API_URL: server.api, PREFECT_LOGGING_TO_API_ENABLED: False}
    with temporary_settings(settings):
        yield


@pytest.fixture
def place(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    with HubServer(token=TOKEN) as running:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", running.url)
        files = f"{running.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
            monkeypatch.setenv(name, "")  # no block of another test is loaded into this process
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
    with build_session(spec, publishes=True) as build:
        make_shards(build)


def sent(spec: BuildSpec, target: str) -> list[int]:
    """The shards that a target has, by the records."""
    build = Build(spec)
    shards = range(len(build.plan.shards))
    return [i for i in shards if UploadStage(build, i, target).current()]


def test_a_target_that_is_away_holds_up_nothing(
    place: HubServer, spec: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All shards are made and sent elsewhere meanwhile; once it is back it gets them all."""
    give_up_after(monkeypatch, 100_000)
    place.fault(Fault("status", "org/away", times=1_000_000))
    # With this test's settings: by itself a thread would start a server of its own.
    run = threading.Thread(target=copy_context().run, args=(send, spec), daemon=True)
    run.start()
    shards = list(range(len(Build(spec).plan.shards)))
    assert len(shards) > 2
    wait_for(lambda: sent(spec, HERE) == shards, "the target that answers lacks shards")
    assert sent(spec, AWAY) == []
    place.faults.clear()
    run.join(60)
    assert sent(spec, AWAY) == shards


def test_a_target_that_fails_is_told_and_left_to_publishing(
    place: HubServer,
    spec: BuildSpec,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The run goes on; its log and its page say what failed, and what is missing where."""
    give_up_after(monkeypatch, 2)
    place.fault(Fault("status", "org/away", times=1_000_000))
    send(spec)
    shards = list(range(len(Build(spec).plan.shards)))
    assert sent(spec, HERE) == shards
    assert sent(spec, AWAY) == []
    assert f"{AWAY} lacks {len(shards)} shards; publishing sends them again" in caplog.text
    problem = f"The upload to {AWAY} failed"
    assert sum(problem in record.getMessage() for record in caplog.records) >= 1
    with get_client(sync_client=True) as client:
        texts = [str(artifact.data) for artifact in client.read_artifacts()]
    assert any(problem in text and "The conversion goes on" in text for text in texts)


def test_shards_leave_the_disk_though_a_target_is_away(
    place: HubServer, spec: BuildSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one target has need not wait here for another; that one gets it when it is back."""
    give_up_after(monkeypatch, 2)
    place.fault(Fault("status", "org/away", times=1_000_000))
    recipe = Path(spec.recipe)
    recipe.write_text(f"{recipe.read_text()}  keep_local: false\n")
    here = Path(spec.workspace) / "checkpoint"
    seen: list[int] = []

    @flow(name="send and restore")
    def send_and_restore(spec: BuildSpec) -> None:
        with build_session(spec, publishes=True) as build:
            ordinary = QuantizeStage.make

            def make(self: QuantizeStage, progress: Progress) -> ShardRecord:
                seen.append(len(list(here.glob("*.safetensors"))))
                return ordinary(self, progress)

            monkeypatch.setattr(QuantizeStage, "make", make)
            make_shards(build)
            assert not list(here.glob("*.safetensors"))
            restore_shards(build)

    send_and_restore(spec)
    build = Build(spec)
    shards = list(range(len(build.plan.shards)))
    assert len(seen) == len(shards) > 3
    assert max(seen) <= 2, "the one that is uploaded, and the one before"
    assert sent(spec, HERE) == shards
    place.faults.clear()
    for i in shards:
        build.conversion.outputs.finished(i).outputs[0].check(here)
        UploadStage(build, i, AWAY).run(lambda *_: None)
    assert sent(spec, AWAY) == shards


def watched(monkeypatch: pytest.MonkeyPatch) -> WatchSpec:
    monkeypatch.setattr("glm_quant.hub.upstream._PATIENCE", Patience(tries=3, first_seconds=0.05))
    return WatchSpec(watched=(Watched(repo=UPSTREAM, deployments=(f"glm-quant/{uuid4()}",)),))


def last_table() -> str:
    found = Artifact.get("upstream")
    assert found is not None
    return str(found.data)


def test_watching_waits_as_long_as_a_rate_limit_asks(
    place: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice 429 with Retry-After: the look comes later, and sees."""
    place.add_commit(UPSTREAM, {"config.json": Content.of_bytes(b"{}")})
    asked = {"Retry-After": "1"}
    place.fault(Fault("status", f"/api/models/{UPSTREAM}", times=2, status=429, headers=asked))
    begin = time.monotonic()
    watch(watched(monkeypatch))
    assert time.monotonic() - begin >= 2
    assert [request.status for request in place.requests("/api/models")] == [429, 429, 200]
    assert "noted: the first look" in last_table()


def test_a_rate_limit_that_stays_is_left_for_the_next_look(
    place: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run ends well, says what it did not see, and forgets nothing."""
    spec = watched(monkeypatch)
    [(where, deployment)] = spec.pairs()
    name = variable_name(where, deployment)
    Variable.set(name, {"uri": "hf://before", "moves": 3}, overwrite=True)
    place.add_commit(UPSTREAM, {"config.json": Content.of_bytes(b"{}")})
    asked = {"Retry-After": "0.1"}
    place.fault(Fault("status", "/api/models", times=1_000, status=429, headers=asked))
    watch(spec)
    assert "not seen" in last_table()
    assert "429" in last_table()
    assert Variable.get(name) == {"uri": "hf://before", "moves": 3}


@pytest.fixture
def no_alarm() -> Iterator[None]:
    """Take pytest-timeout's handler away: Prefect's limit wants the alarm for itself."""
    before = signal.signal(signal.SIGALRM, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGALRM, before)


def test_a_look_that_hangs_is_ended(place: HubServer, no_alarm: None) -> None:
    """A server that takes the request and says nothing costs a look its limit, and no more."""
    place.fault(Fault("delay", "/api/models", seconds=500.0))

    @flow(name="look once")
    def look_once() -> str:
        limited = look.with_options(timeout_seconds=1)
        where = Look(repo=UPSTREAM, revision="main", first="note")
        return limited(where, "glm-quant/none", return_state=True).name or ""

    assert look_once() == "TimedOut"


def run_in(client: SyncPrefectClient, pool: str, restarts: int) -> str:
    """A run of a deployment that restarts by itself; nobody works in its pool."""
    client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
    flow_id = client.create_flow_from_name("glm-quant")
    deployment = client.create_deployment(flow_id, f"of {pool}", work_pool_name=pool)
    parameters = {"spec": {"recipe": "demo", "restarts": restarts}}
    run = client.create_flow_run_from_deployment(
        deployment, parameters=parameters, tags=[RESTART_TAG]
    )
    return str(run.id)


def test_restarts_have_an_end_that_a_person_moves() -> None:
    """A run that crashes again and again stops after its limit; Retry gives it as many again."""
    pool, restarts = f"pool {uuid4()}", 2
    with get_client(sync_client=True) as client:
        run = run_in(client, pool, restarts)

        def crash_and_look() -> int:
            client.set_flow_run_state(run, Crashed(), force=True)
            return len(restart_crashed(pool, calm_seconds=0))

        assert [crash_and_look() for _ in range(4)] == [1, 1, 0, 0]
        client.set_flow_run_state(run, AwaitingRetry(message="Retry from the UI"), force=True)
        assert [crash_and_look() for _ in range(4)] == [1, 1, 0, 0]
        client.set_flow_run_state(run, Crashed(), force=True)
        assert restart_crashed(pool, calm_seconds=60) == []


def test_the_page_of_a_dead_run_shows_nothing_running() -> None:
    """Tasks that its process left are marked at the next look, and looked for once a crash."""
    pool = f"pool {uuid4()}"

    @task(name="left")
    def left() -> None: ...

    with get_client(sync_client=True) as client:
        run = UUID(run_in(client, pool, restarts=0))
        begun = client.create_task_run(left, run, dynamic_key="0", state=Running()).id
        closed: set[UUID] = set()
        close_crashed(pool, closed)
        assert client.read_task_run(begun).state_name == "Running", "its run has not crashed"
        client.set_flow_run_state(run, Crashed(), force=True)
        close_crashed(pool, closed)
        assert client.read_task_run(begun).state_name == "Crashed"
        assert len(closed) == 1
