"""Every command in the README is run: here, or by `.ci/run`."""

import re
import shlex
from pathlib import Path

import pytest

from glm_quant.data import held_out_text, tiny_glm_path
from tests.architectures.small_models import make_small_checkpoint
from tests.e2e.command_line import CommandLine
from tests.plain import PLAIN

ROOT = Path(__file__).parents[2]
# These run other tests or this one: the gate itself runs them.
BY_THE_GATE = {"uv run pytest", "bash .ci/run"}
BY_THE_DEMO = {"uv run glm-quant demo"}
# These do not end by themselves: `service.py` starts them for the tests of the service.
BY_THE_SERVICE = {
    "uv run glm-quant server --save-address",
    "uv run glm-quant worker --home ~/glm-quant",
    "uv run prefect deployment run glm-quant/dynamic",
}


def commands() -> list[str]:
    """The lines of the README's shell blocks."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if not language]
    programs = ("uv run ", "bash ", "mlx_lm.")
    return [line for block in blocks for line in block.splitlines() if line.startswith(programs)]


def test_the_gate_runs_what_this_test_cannot() -> None:
    """The commands that start the tests are in `.ci/run`, which is the last of them."""
    gate = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert set(commands()) >= BY_THE_GATE
    assert re.search(r"^uv run --no-sync pytest\b", gate, re.MULTILINE)
    demo = (ROOT / "tests" / "e2e" / "test_demo.py").read_text(encoding="utf-8")
    assert set(commands()) >= BY_THE_DEMO
    assert 'embedded.run("demo"' in demo


def test_the_service_runs_what_does_not_end() -> None:
    """Server, worker and deployment are started by the tests of the service, as README says."""
    folder = ROOT / "tests" / "e2e"
    service = (folder / "service.py").read_text(encoding="utf-8")
    assert set(commands()) >= BY_THE_SERVICE
    assert 'start("server", *options' in service
    assert '"--save-address"' in service
    assert 'start("worker", "--home"' in service
    fresh_shell = (folder / "test_service.py").read_text(encoding="utf-8")
    assert '"prefect", "deployment", "run", "glm-quant/dynamic"' in fresh_shell


@pytest.mark.slow
def test_commands_run_in_order(cli: CommandLine, quick: Path, tmp_path: Path) -> None:
    """Plan, convert, run, status, verify and stock generation, as written, on the small GLM.

    Only places change, and the recipes of what calibrates or evaluates for a real machine.
    """
    (tmp_path / "texts.txt").write_text(held_out_text()[:2000])
    make_small_checkpoint("qwen3_moe", tmp_path / "Qwen3-235B-A22B")
    ran = 0
    for command in commands():
        if command in BY_THE_GATE | BY_THE_DEMO | BY_THE_SERVICE:
            continue
        words = shlex.split(command.removeprefix("uv run "))
        if words[1] == "run":
            words[2] = str(quick)
        elif words[1] in ("plan", "convert") and "GLM" in command:
            words[words.index("--recipe") + 1] = "demo"
        elif words[1] == "fit":
            words += [
                "--recipe",
                PLAIN,
                *["--measure", "scaled", "--tokens", "64", "--context", "32"],
            ]
        words = [
            word.replace("PATH/GLM-5.2-2.56bpw", str(tmp_path / "converted"))
            .replace("PATH/GLM-5.2", str(tiny_glm_path()))
            .replace("PATH", str(tmp_path))
            for word in words
        ]
        done = cli.run(*words[1:], program=words[0])
        assert done.stdout.strip(), command
        ran += 1
    elsewhere = BY_THE_GATE | BY_THE_DEMO | BY_THE_SERVICE
    assert ran == len(set(commands()) - elsewhere) > 5
