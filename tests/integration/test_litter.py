"""Commands in folders that an operating system or a person left something in."""

import shutil
from pathlib import Path

from tests.conftest import leave_litter, run_command
from tests.plain import PLAIN


def glm_quant(*arguments: str | Path) -> str:
    """Run a command to its good end; return what it printed."""
    return run_command(*arguments).stdout


def test_convert_and_verify_on_a_disk_that_was_looked_at(small_copy: Path, tmp_path: Path) -> None:
    """Litter in source, output, records and imatrix folder is nowhere in the way, and stays."""
    output = tmp_path / "converted"
    output.mkdir()
    leave_litter(output)
    leave_litter(small_copy)
    command = ("convert", "--source", small_copy, "--recipe", PLAIN, "--output", output)
    first = glm_quant(*command)
    beside = output.with_name(".converted.glm-quant")
    for folder in (output, beside, beside / "records", beside / "records" / "shards"):
        leave_litter(folder)
    assert glm_quant(*command) == first
    assert "whole" in glm_quant("verify", output, "--source", small_copy)
    again = tmp_path / "again"
    shutil.copytree(output, again)
    leave_litter(again)
    assert "whole" in glm_quant("verify", again)
    assert (output / ".DS_Store").exists()
    assert (output / ".Trashes" / "inside.json").exists()
