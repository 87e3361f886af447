"""A workspace: refused where something else lies, and worked in by one process at a time."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from glm_quant.errors import BusyError, OutputError
from glm_quant.workspace import Workspace

from ..conftest import leave_litter

HOLD = """
import sys, time
from pathlib import Path
from glm_quant.workspace import Workspace
workspace = Workspace(Path(sys.argv[1]))
workspace.create()
with workspace.locked():
    print("held", flush=True)
    time.sleep(60)
"""


def test_fresh_folder(tmp_path: Path) -> None:
    """A folder that does not exist is made, and can be opened again with its contents."""
    workspace = Workspace(tmp_path / "a" / "b")
    workspace.create()
    for name in (
        "checkpoint",
        "scratch",
        "partial",
        "records",
        "divergence",
        "results",
        "published",
    ):
        (workspace.root / name).mkdir()
    workspace.create()


def test_foreign_folder(tmp_path: Path) -> None:
    """A folder with other files is refused by name, and stays as it was."""
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match=r"something else \(thesis\.tex\)\. Choose an empty"):
        Workspace(tmp_path).create()
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_litter_and_notes(tmp_path: Path) -> None:
    """An opened disk is a fresh folder, and a note in a workspace is in nobody's way.

    Weights of somebody's among the build's are: they would be loaded with them, and are named.
    """
    leave_litter(tmp_path)
    workspace = Workspace(tmp_path)
    workspace.create()
    workspace.records.mkdir()
    workspace.checkpoint.mkdir()
    leave_litter(workspace.checkpoint)
    (tmp_path / "notes.txt").write_text("x")
    workspace.create()
    (workspace.checkpoint / "model-00001-of-00002.safetensors").touch()
    leave_litter(workspace.checkpoint)
    workspace.create()
    (workspace.checkpoint / "model-00001-of-00002 copy.safetensors").touch()
    with pytest.raises(OutputError, match=r"copy\.safetensors: it is no shard of a build"):
        workspace.create()
    assert (tmp_path / "notes.txt").exists()


def test_foreign_checkpoint_folder(tmp_path: Path) -> None:
    """A `checkpoint` folder alone makes no workspace: a training run's must not be written into."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "model.safetensors").write_bytes(b"months of work")
    with pytest.raises(OutputError, match=r"something else \(checkpoint\)"):
        Workspace(tmp_path).create()


def test_file_instead_of_a_folder(tmp_path: Path) -> None:
    """A file in the workspace's place is refused."""
    (tmp_path / "w").write_text("x")
    with pytest.raises(OutputError, match="this is a file"):
        Workspace(tmp_path / "w").create()


def test_second_run_is_refused_and_a_dead_one_is_not(tmp_path: Path) -> None:
    """While another process works, its number is named; when it is killed, the lock is free."""
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with (
            pytest.raises(BusyError, match=f"process {other.pid} is already working here"),
            Workspace(tmp_path).locked(),
        ):
            pass
        other.send_signal(signal.SIGKILL)
        other.wait()
    with Workspace(tmp_path).locked():
        assert (tmp_path / ".lock").read_text() == str(os.getpid())
    with Workspace(tmp_path).locked():
        pass
