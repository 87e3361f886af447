"""The service as it runs for weeks: everything that can die dies, a person presses buttons.

One build goes through all of it, since each start of a server, a worker or a run takes seconds.
"""

import json
import os
import re
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from huggingface_hub import snapshot_download

from deployments.automations import silent_runs
from deployments.restarts import is_flow_process
from glm_quant.data import tiny_glm_path
from tests.e2e.command_line import in_fresh_shell
from tests.e2e.conftest import AWS_SECRET, BUCKET, HUB_TOKEN, UPSTREAM
from tests.e2e.network import RecordingProxy, forwarded
from tests.e2e.service import FINAL, Service, tracebacks, wait_for
from tests.e2e.test_demo import digests
from tests.hub_server import Content, HubServer
from tests.s3_server import connect

pytestmark = pytest.mark.slow

# One source shard of the small checkpoint, 1.7 MB, takes about two seconds at this rate.
SLOW = 800_000.0
TARGET = "team/survivor"
APPROVED = "published/approved"
LOOK = {
    "watched": [{"repo": UPSTREAM, "deployments": ["glm-quant/dynamic"]},
                {"repo": "gone/away", "deployments": ["glm-quant/dynamic"]}],
    "families": [{"author": "upstream", "pattern": "tiny.*"}],
}  # fmt: skip


@dataclass
class Build:
    """A build on its way, and when each shard's record was first seen."""

    workspace: Path
    spec: dict[str, Any]
    first_seen: dict[str, int]
    run: str = ""

    def shards(self) -> dict[str, int]:
        """Return when each finished shard was recorded."""
        folder = self.workspace / "records" / "shards"
        found = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
        self.first_seen = found | self.first_seen
        return found

    def one_more(self) -> None:
        """Wait until another shard is finished, from now on."""
        before = len(self.shards())
        wait_for(lambda: len(self.shards()) > before, f"no shard after the first {before}")


def build_of(service: Service, recipe: Path, name: str, *targets: str) -> Build:
    """Return a build that is not begun."""
    workspace = f"builds/{name}"
    spec = {
        "recipe": str(recipe),
        "source": f"hf://{UPSTREAM}",
        "workspace": workspace,
        "targets": targets,
        "window": 1,
        "restarts": 20,
    }
    return Build(service.home / workspace, spec, {})


@pytest.fixture(scope="module")
def first_look(service: Service) -> str:
    """The run that looks upstream for the first time."""
    return service.run("glm-quant-watch/upstream", **LOOK)


@pytest.fixture(scope="module")
def survivor(service: Service, hub: HubServer, quick: Path, first_look: str) -> Build:
    """A build whose run met everything at once.

    Its process is killed; the whole machine restarts; its worker is killed; the server is away.
    """
    targets = "published/survivor", f"hf://{TARGET}", f"s3://{BUCKET}/survivor"
    build = build_of(service, quick, "survivor", *targets)
    hub.rate = SLOW
    build.run = run = service.run_by_command("glm-quant/dynamic", **build.spec)
    build.one_more()
    os.kill(service.pid(run), signal.SIGKILL)
    build.one_more()
    # The machine goes down and boots: the worker waits for the server and finds its dead run.
    pid = service.pid(run)
    service.stop_worker()
    if is_flow_process(pid):
        os.kill(pid, signal.SIGKILL)
    service.server.kill()
    service.server.begin()
    service.start_worker()
    build.one_more()
    # The run goes on without worker and server.
    service.kill_worker()
    service.server.kill()
    build.one_more()
    service.server.begin()
    hub.rate = None
    service.start_worker()
    service.wait(run, "COMPLETED")
    return build


@pytest.fixture(scope="module")
def assessed(service: Service, survivor: Build, quick: Path) -> str:
    """A run of the deployment that judges a finished build; not waited for.

    Meanwhile another process keeps the server's database locked, for half a minute.
    """
    run = service.run(
        "glm-quant-assess/assess",
        recipe=str(quick),
        source=survivor.spec["source"],
        checkpoint="builds/survivor/checkpoint",
        workspace="builds/assess",
    )
    service.wait(run, "RUNNING", *FINAL)
    service.server.lock_database(30)
    return run


def test_only_unfinished_work_is_done_and_the_bytes_are_the_same(
    service: Service, survivor: Build, quick: Path, tmp_path: Path
) -> None:
    """No shard that was finished before a death was made again; the result is the usual one."""
    assert service.get(survivor.run)["run_count"] >= 3
    assert survivor.shards() == survivor.first_seen
    undisturbed = tmp_path / "undisturbed"
    done = service.command_line.run(
        *("convert", "--source", tiny_glm_path(), "--recipe", quick, "--output", undisturbed)
    )
    assert done.stdout
    expected, made = digests(undisturbed), digests(survivor.workspace / "checkpoint")
    differing = {name for name in expected if expected[name] != made[name]}
    assert differing == {"manifest.json"}, "the manifest alone says where the source was"
    assert digests(service.home / "published" / "survivor") == made


def test_the_published_repository_runs_in_stock_mlx_lm(
    hub: HubServer, survivor: Build, assessed: str, stock: Path, tmp_path: Path
) -> None:
    """What a user downloads from the Hub generates in an environment that has mlx-lm and not us."""
    folder = snapshot_download(
        TARGET, endpoint=hub.url, token=HUB_TOKEN, local_dir=tmp_path / "downloaded"
    )
    assert digests(Path(folder)).items() >= digests(survivor.workspace / "checkpoint").items()
    done = subprocess.run(
        [
            *(stock / "mlx_lm.generate", "--model", folder, "--trust-remote-code"),
            *("--prompt", "def name(self):", "--max-tokens", "4"),
        ],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Generation: 4 tokens" in done.stdout, done.stderr


def test_the_bucket_names_the_same_build(survivor: Build, s3_url: str) -> None:
    """LATEST lists every file of it, and each object carries its sha256."""
    client = connect(s3_url, seconds=20)
    latest = json.loads(client.get_object(Bucket=BUCKET, Key="survivor/LATEST")["Body"].read())
    listed = {file["path"]: file["sha256"] for file in latest["files"]}
    assert listed.items() >= digests(survivor.workspace / "checkpoint").items()
    for name, sha256 in listed.items():
        there = client.head_object(Bucket=BUCKET, Key=f"survivor/{latest['prefix']}/{name}")
        assert there["Metadata"]["sha256"] == sha256


def test_a_finished_build_is_judged(service: Service, survivor: Build, assessed: str) -> None:
    """The deployment `assess` verifies, compares and measures, and its page shows what it found.

    It does not notice that the database was locked (prefect#18934).
    """
    finished = service.wait(assessed)
    assert finished["state_type"] == "COMPLETED"
    assert finished["run_count"] == 1
    judged = {"verify", "parity", "divergence", "evaluate"}
    states = service.task_states(assessed)
    assert {states[name] for name in judged} == {"Completed"}
    found = service.artifacts(assessed)
    made = service.artifacts(survivor.run)
    for table in ("parity", "divergence"):
        assert found[table]["data"] == made[table]["data"]
    assert "evaluation" in found


def test_the_page_of_a_run_tells_what_it_did(service: Service, survivor: Build) -> None:
    """Readable names, the tables, the card with its charts, and our log lines."""
    run = service.get(survivor.run)
    assert run["name"] == f"quick of {UPSTREAM}"
    found = service.artifacts(survivor.run)
    tables = {"components", "shards", "parity", "divergence", "evaluation"}
    assert {"progress", "source", "card"} | tables <= set(found)
    assert f"/{TARGET}/tree/" in found["published-hf-team-survivor"]["data"]
    assert found["progress"]["data"] == 100
    assert "data:image/png;base64," in found["card"]["data"]
    assert "quantize 9 of 9" in service.task_states(survivor.run)
    assert any(line.startswith("assemble: ") for line in service.logs(survivor.run))
    assert service.dead_tasks(survivor.run), "what was killed is shown as running for ever"


@dataclass
class Moved:
    """Upstream after its move: the looks at it, and the build that one of them asked for."""

    commit: str
    looks: list[str]
    run: dict[str, Any]
    before: dict[str, str]


@pytest.fixture(scope="module")
def moved(service: Service, hub: HubServer, survivor: Build, first_look: str) -> Moved:
    """A small file changes upstream, twice looked at; the build then waits for a person's word."""
    assert service.wait(first_look)["state_type"] == "COMPLETED"
    assert service.runs_with_tag("upstream") == []
    before = digests(survivor.workspace / "checkpoint")
    approved = {"approval": True, "targets": [*survivor.spec["targets"], APPROVED]}
    service.set_spec("glm-quant/dynamic", survivor.spec | approved)
    hub.add_commit("upstream/tiny-next", {})
    files = dict(hub.head(UPSTREAM))
    files["generation_config.json"] = Content.of_bytes(b'{"temperature": 0.5}\n')
    commit = hub.add_commit(UPSTREAM, files)
    looks = [service.run("glm-quant-watch/upstream", **LOOK) for _ in range(2)]
    assert [service.wait(one)["state_type"] for one in looks] == ["COMPLETED", "COMPLETED"]
    [run] = service.runs_with_tag("upstream")
    service.wait(run["id"])
    return Moved(commit, looks, run, before)


def test_upstream_moves_and_only_what_changed_is_made(
    service: Service, survivor: Build, moved: Moved
) -> None:
    """The same weights from a new commit, never built twice; a new model is proposed."""
    assert moved.run["parameters"]["spec"]["source"] == f"hf://{UPSTREAM}@{moved.commit}"
    table = service.artifacts(moved.looks[1])["upstream"]["data"]
    assert "upstream/tiny-next" in table
    assert "gone/away" in table
    after = digests(survivor.workspace / "checkpoint")
    changed = {name for name in after if after[name] != moved.before.get(name)}
    assert changed == {"generation_config.json", "manifest.json"}
    assert survivor.shards() == survivor.first_seen


def test_a_person_is_asked_before_publishing(
    service: Service, survivor: Build, moved: Moved, s3_url: str
) -> None:
    """Silence and No end the run and lose nothing; Retry asks again; Yes publishes everywhere."""
    run, target = moved.run["id"], service.home / APPROVED
    assert service.get(run)["state_name"] == "Suspended"
    assert APPROVED in service.artifacts(run)["approval"]["data"]
    service.let_expire(run)
    assert "never resumed" in service.wait(run, "FAILED")["state"]["message"]
    service.retry(run)
    service.wait(run, "PAUSED")
    states = service.task_states(run)
    assert {states[name] for name in states if name.startswith("quantize")} == {"Cached"}
    service.command_line.run("approve", run, "--reject", "--note", "not today")
    assert "not today" in service.wait(run, "FAILED")["state"]["message"]
    assert not target.exists()
    assert digests(service.home / "published" / "survivor") == moved.before
    service.retry(run)
    service.wait(run, "PAUSED")
    service.command_line.run("approve", run)
    service.wait(run, "COMPLETED")
    made = digests(survivor.workspace / "checkpoint")
    assert digests(target) == digests(service.home / "published" / "survivor") == made
    client = connect(s3_url, seconds=20)
    latest = json.loads(client.get_object(Bucket=BUCKET, Key="survivor/LATEST")["Body"].read())
    assert {file["path"]: file["sha256"] for file in latest["files"]}.items() >= made.items()


def test_the_hourly_look_is_scheduled_and_runs(service: Service) -> None:
    """The schedule makes runs ahead of time, the worker runs what is due, no log has a traceback.

    The run that is looked at is the schedule's own, put forward so that nobody waits for an hour.
    """
    upstream = service.ask("GET", "/deployments/name/glm-quant-watch/upstream")["id"]
    criteria = {
        "deployments": {"id": {"any_": [upstream]}},
        "flow_runs": {"state": {"type": {"any_": ["SCHEDULED"]}}},
        "sort": "EXPECTED_START_TIME_DESC",
    }

    def scheduled() -> list[dict[str, Any]]:
        runs = service.ask("POST", "/flow_runs/filter", **criteria)
        return [run for run in runs if run["auto_scheduled"]]

    run = wait_for(scheduled, "the schedule made no run")[0]["id"]
    now = datetime.now(UTC).isoformat()
    state = {"type": "SCHEDULED", "state_details": {"scheduled_time": now}}
    service.ask("POST", f"/flow_runs/{run}/set_state", state=state, force=True)
    assert service.wait(run, *FINAL)["state_type"] == "COMPLETED"
    assert not tracebacks(service.server.log)
    assert not tracebacks(service.log)


def test_the_ui_asks_the_server_that_it_came_from(service: Service) -> None:
    """Also on another port than Prefect's own, where the page would say that it cannot connect."""
    root = service.server.api.removesuffix("/api")
    assert httpx.get(f"{root}/ui-settings").json()["api_url"] == service.server.api


def test_a_fresh_shell_finds_the_server(service: Service, outside: RecordingProxy) -> None:
    """README's command, and ours, find it in the profile that `--save-address` wrote."""
    home = service.server.command_line.home
    words = "prefect", "deployment", "run", "glm-quant/dynamic"
    code, screen = in_fresh_shell(home, outside.url, *words)
    assert code == 0, screen
    uuid = re.search(r"UUID: ([0-9a-f-]{36})", screen)
    assert uuid, screen
    # What becomes of its build other tests see.
    assert service.wait(uuid[1])["run_count"] == 1
    code, screen = in_fresh_shell(home, outside.url, "glm-quant", "approve", "nobody")
    assert code == 2, screen
    assert "0 runs of this name" in screen


def test_the_default_address_is_tried(
    service: Service, outside: RecordingProxy, tmp_path: Path
) -> None:
    """Without variable and profile a command uses the server there, and never starts another."""
    approve = tmp_path, outside.url, "glm-quant", "approve", "nobody"
    try:
        listener = socket.create_server(("127.0.0.1", 4200))
    except OSError:
        pytest.skip("something listens at the default address")
    with forwarded(listener, service.server.port):
        code, screen = in_fresh_shell(*approve)
    assert code == 2, screen
    assert "0 runs of this name" in screen
    code, screen = in_fresh_shell(*approve)
    assert code == 1, screen
    assert "no Prefect server answers there" in screen
    assert not (tmp_path / ".prefect" / "prefect.db").exists()


def test_nobody_is_told_who_uses_this(outside: RecordingProxy, service: Service) -> None:
    """Server, worker, runs and commands in a terminal ask for nothing outside of this machine."""
    assert outside.hosts == []


def test_cancel_stops_soon_and_the_workspace_resumes(
    service: Service, hub: HubServer, quick: Path
) -> None:
    """A cancelled run ends; what it had finished is not made again.

    The process ends within seconds; Prefect's worker says `Cancelled` when it has loaded the flow.
    """
    build = build_of(service, quick, "cancelled")
    hub.rate = SLOW
    run = service.run("glm-quant/dynamic", **build.spec)
    build.one_more()
    pid, begin = service.pid(run), time.monotonic()
    service.cancel(run)
    wait_for(lambda: not is_flow_process(pid), "the run's process goes on")
    print(f"stopped {time.monotonic() - begin:.1f} s after Cancel")
    service.wait(run, "CANCELLED")
    hub.rate = None
    again = service.run("glm-quant/dynamic", **build.spec | {"restarts": 0})
    shard_count = 9
    wait_for(lambda: len(build.shards()) == shard_count, "the workspace does not resume")
    assert build.shards() == build.first_seen
    os.kill(service.pid(again), signal.SIGKILL)
    service.wait(again, "CRASHED")


def test_a_run_that_goes_silent_is_marked(service: Service) -> None:
    """The server's automation marks a run whose last sign of life was a heartbeat."""
    run = service.start_elsewhere("glm-quant/dynamic")
    wanted = silent_runs(timedelta(seconds=10)).model_dump(mode="json")
    wanted["trigger"]["match"] = {"prefect.resource.id": [f"prefect.flow-run.{run}"]}
    service.ask("POST", "/automations/", **wanted)
    time.sleep(2)  # until the server has loaded it
    service.beat(run, "glm-quant")
    found = service.wait(run, "CRASHED")
    assert "Nothing was heard" in found["state"]["message"]


def test_no_secret_is_anywhere(service: Service, hub: HubServer, survivor: Build) -> None:
    """Neither the token from the Secret block nor the key from the environment was written."""
    used = {request.authorization for request in hub.requests(UPSTREAM)}
    assert f"Bearer {HUB_TOKEN}" in used
    places = [service.home, service.server.command_line.prefect_home, service.log.parent]
    searched = 0
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        data = path.read_bytes()
        searched += len(data)
        for secret in (HUB_TOKEN, AWS_SECRET):
            assert secret.encode() not in data, path
    assert searched > 10_000_000
