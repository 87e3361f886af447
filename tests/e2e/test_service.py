"""The service as it runs for weeks: everything that can die dies, a person presses buttons."""

import os
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from glm_quant.testbed import tiny_glm_path
from tests.e2e.conftest import UPSTREAM
from tests.e2e.service import Service, wait_for
from tests.e2e.test_demo import digests
from tests.hub_server import HubServer

pytestmark = pytest.mark.slow

# One source shard of the small checkpoint, 1.7 MB, takes about two seconds at this rate.
SLOW = 800_000.0


@dataclass
class Build:
    """A build on its way, and the record of each shard when it was first seen."""

    workspace: Path
    first_seen: dict[str, int]

    def shards(self) -> dict[str, int]:
        """Return when each finished shard was recorded."""
        folder = self.workspace / "records" / "shards"
        found = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.json")}
        self.first_seen = found | self.first_seen
        return found

    def one_more(self) -> None:
        """Wait until another shard is finished."""
        before = len(self.first_seen)
        wait_for(lambda: len(self.shards()) > before, f"no shard after the first {before}")


@pytest.fixture(scope="module")
def survivor(service: Service, hub: HubServer, quick: Path) -> tuple[str, Build]:
    """A run that met everything at once, and its build.

    Its process is killed; the whole machine loses power; its worker is killed; the server is away.
    """
    build = Build(service.home / "builds" / "survivor", {})
    hub.rate = SLOW
    run = service.run(
        "glm-quant/dynamic",
        recipe=str(quick),
        source=f"hf://{UPSTREAM}",
        workspace="builds/survivor",
        targets=["published/survivor"],
        window=1,
        restarts=20,
    )
    build.one_more()
    os.kill(service.pid(run), signal.SIGKILL)
    build.one_more()
    # Power fails, then the machine boots: the worker finds its dead run.
    pid = service.pid(run)
    service.kill_worker()
    service.server.kill()
    os.kill(pid, signal.SIGKILL)
    service.server.start()
    service.start_worker()
    build.one_more()
    # The run goes on without worker and server.
    service.kill_worker()
    service.server.kill()
    build.one_more()
    service.server.start()
    hub.rate = None
    service.wait(run, "COMPLETED")
    service.start_worker()
    return run, build


def test_only_unfinished_work_is_done_and_the_bytes_are_the_same(
    service: Service, hub: HubServer, survivor: tuple[str, Build], quick: Path, tmp_path: Path
) -> None:
    """No shard that was finished before a death was made again; the result is the usual one."""
    run, build = survivor
    assert service.get(run)["run_count"] >= 3
    assert build.shards() == build.first_seen
    undisturbed = tmp_path / "undisturbed"
    done = service.command_line.run(
        *("convert", "--source", tiny_glm_path(), "--recipe", quick, "--output", undisturbed)
    )
    assert done.stdout
    expected, made = digests(undisturbed), digests(build.workspace / "checkpoint")
    differing = {name for name in expected if expected[name] != made[name]}
    assert differing == {"manifest.json"}, "the manifest alone says where the source was"
    assert digests(service.home / "published" / "survivor") == made
