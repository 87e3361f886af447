"""Targets and disks are judged before the work: what would fail after hours fails in seconds."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glm_quant.data import tiny_glm_path
from tests.hub_server import HubServer

TOKEN = "hf_PlantedTokenOfTheJudge"
PROGRAM = str(Path(sys.executable).with_name("glm-quant"))


def run(workspace: Path, *targets: str, around: tuple[str, ...] = (), **env: str) -> str:
    """Run a build that must be refused; returns its message, and sees that nothing was made."""
    options = [word for target in targets for word in ("--publish", target)]
    command = [PROGRAM, "run", "demo", "--source", str(tiny_glm_path())]
    command += ["--workspace", str(workspace), *options]
    clean = {name: value for name, value in os.environ.items() if name != "HF_TOKEN"}
    done = subprocess.run(
        [*around, *command],
        env=clean | {"PREFECT_HOME": str(workspace.parent / "prefect")} | env,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert not (workspace.parent / "prefect").exists(), "Prefect was started"
    assert not (workspace / "partial").exists()
    return done.stderr


def test_a_run_is_refused_before_its_work(tmp_path: Path) -> None:
    """Without a token, with one that may only read, and over a folder of something else."""
    home = tmp_path / "home"
    with HubServer(token=TOKEN) as hub:
        place = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        message = run(tmp_path / "a", "hf://org/build", **place)
        assert "PublishError hf://org/build@main: ask whether we may write" in message
        assert "there is no token. Log in with `hf auth login`, or set HF_TOKEN." in message
        hub.token_role = "read"
        message = run(tmp_path / "b", "hf://org/build", HF_TOKEN=TOKEN, **place)
        assert "the token 'of the tests' of tester may only read" in message
        assert TOKEN not in message
    thesis = tmp_path / "mine" / "thesis.tex"
    thesis.parent.mkdir()
    thesis.write_text("x")
    message = run(tmp_path / "c", str(thesis.parent))
    assert "it holds something that is no build of glm-quant (thesis.tex)" in message


def test_a_disk_that_is_too_small_is_told_before_the_work(tmp_path: Path) -> None:
    """The published copy on a disk of its own counts, by the plan's bytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ("unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1m tmpfs "$0" && exec "$@"')
    around = (*mount, str(disk))
    possible = shutil.which("unshare") and subprocess.run([*around, "true"], check=False)
    if not possible or possible.returncode:
        pytest.skip("no small disk can be mounted here")
    message = run(tmp_path / "work", str(disk / "published"), around=around)
    assert f"DiskSpaceError {disk}: this run writes" in message
    assert "published copy 0.0" in message
    assert "GB are free. Free " in message
