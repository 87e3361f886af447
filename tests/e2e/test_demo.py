"""The flow as a user runs it: the demo, its resume, a kill at any moment, its gates."""

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from glm_quant.artifact import sha256_file
from glm_quant.data import tiny_glm_path
from glm_quant.litter import entries, is_litter
from glm_quant.recipe import load_recipe
from glm_quant.workspace import Workspace
from tests.card_numbers import unexplained
from tests.conftest import leave_litter
from tests.e2e.command_line import CommandLine


def digests(folder: Path) -> dict[str, str]:
    """Every file of a build but the card and its charts, which hold measured times."""
    return {
        path.name: sha256_file(path)
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in ("README.md", "notes.txt")
        if not is_litter(path.name)
    }


@pytest.fixture(scope="module")
def finished(cli: CommandLine, quick: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of one uninterrupted quick run."""
    workspace = tmp_path_factory.mktemp("runs") / "finished"
    cli.run(
        *("run", quick, "--source", tiny_glm_path(), "--workspace", workspace),
        *("--publish", workspace / "published" / "quick"),
    )
    return workspace


@pytest.mark.slow
def test_demo_ends_with_a_published_checkpoint_and_its_card(
    embedded: CommandLine, tmp_path: Path
) -> None:
    """`glm-quant demo` needs nothing but itself and tells where the result is."""
    workspace = tmp_path / "demo"
    done = embedded.run("demo", "--workspace", workspace, "--json")
    result = json.loads(done.stdout)
    published = workspace / "published" / "tiny-glm-mlx"
    assert Path(result["checkpoint"]).samefile(workspace / "checkpoint")
    assert (published / "README.md").read_text().startswith("---\n")
    assert digests(published) == digests(workspace / "checkpoint")
    assert {stage["stage"] for stage in result["stages"]} == {
        *(
            "download",
            "plan",
            "calibrate",
            "quantize",
            "assemble",
            "parity",
            "divergence",
            "evaluate",
            "card",
            "publish",
        )
    }
    elsewhere = tmp_path / "elsewhere"
    embedded.run("publish", workspace, "--to", elsewhere)
    assert digests(elsewhere) == digests(published)
    card = (published / "README.md").read_text()
    assert unexplained(card, workspace) == []
    charts = set(re.findall(r"\(assets/(\w+)\.png#hf-light-mode-only\)", card))
    wanted = ("recipe", "footprint", "divergence", "layers", "bits", "needle", "memory")
    assert charts == set(wanted)
    for row in (
        *("| python-endings.jsonl, asked as HellaSwag", "| python-lines.jsonl, asked as PIQA"),
        *("| python-names.jsonl, asked as WinoGrande", "| Perplexity, python-chats.jsonl |"),
        *("| KL to the source, mean, uniform\u20114bit |", "| needle retrieval, uniform-4bit |"),
    ):
        assert row.replace("\u2011", "-") in card.replace("\u2011", "-")
    options = ("--source", tiny_glm_path(), "--imatrix", workspace / "calibration" / "imatrix")
    verified = json.loads(embedded.run("verify", published, *options, "--json").stdout)
    assert verified["rederived_blocks"] > 0 == verified["calibrated"]


@pytest.mark.slow
def test_a_second_run_does_nothing_and_a_lost_file_is_made_again(
    cli: CommandLine, quick: Path, finished: Path
) -> None:
    """What stands on disk is not made again; what is gone is, and only that.

    What an operating system or a person left in any folder of the build changes nothing and stays.
    """
    before = digests(finished / "checkpoint")
    shards = sorted((finished / "checkpoint").glob("*.safetensors"))
    stamps = {shard.name: shard.stat().st_mtime_ns for shard in shards}
    shards[1].unlink()
    published = finished / "published" / "quick"
    for folder in (finished, *(path for path in finished.rglob("*") if path.is_dir())):
        leave_litter(folder)
        (folder / "notes.txt").write_text("a person's")
    cli.run(
        *("run", quick, "--source", tiny_glm_path(), "--workspace", finished),
        *("--publish", finished / "published" / "quick"),
    )
    after = {shard.name: shard.stat().st_mtime_ns for shard in shards}
    changed = [name for name in stamps if stamps[name] != after[name]]
    assert changed == [shards[1].name]
    assert digests(finished / "checkpoint") == before
    assert (finished / "notes.txt").read_text() == "a person's"
    assert (published / "notes.txt").read_text() == "a person's"
    for folder in (finished / "checkpoint", published):
        cli.run("verify", folder)


@pytest.mark.slow
def test_kill_at_random_moments_gives_the_same_bytes(
    cli: CommandLine, quick: Path, finished: Path, tmp_path: Path
) -> None:
    """`kill -9`, then the same command: byte for byte what an uninterrupted run makes."""
    seed = int(os.environ.get("GLM_QUANT_TEST_SEED", "0")) or random.randrange(1, 10**6)
    print(f"seed {seed}: GLM_QUANT_TEST_SEED={seed} chooses the same moments")
    moments = random.Random(seed)
    workspace = tmp_path / "killed"
    arguments = ("run", quick, "--source", tiny_glm_path(), "--workspace", workspace)
    killed = 0
    for _ in range(3):
        process = cli.start(*arguments)
        # Kill somewhere after the work has begun: when records appear, and a random while later.
        deadline = time.monotonic() + 300
        while not (workspace / "records").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 3))
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed
    cli.run(*arguments)
    assert digests(workspace / "checkpoint") == digests(finished / "checkpoint")
    assert not (workspace / "partial").exists()


@pytest.mark.slow
def test_a_broken_bound_stops_before_publishing(
    cli: CommandLine, quick: Path, tmp_path: Path
) -> None:
    """Perplexity above the recipe's bound: nothing is published, and status says why."""
    recipe = tmp_path / "strict.yaml"
    recipe.write_text(
        quick.read_text().replace(
            "evaluation:\n", "evaluation:\n  bounds: [{measure: perplexity, max: 1.5}]\n"
        )
    )
    assert load_recipe(recipe).evaluation.bounds
    workspace, target = tmp_path / "strict", tmp_path / "published"
    done = cli.run(
        *("run", recipe, "--source", tiny_glm_path(), "--workspace", workspace),
        *("--publish", target),
        expect=1,
    )
    assert "the recipe's max is 1.5" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not target.exists()
    status = json.loads(cli.run("status", workspace, "--json").stdout)
    assert status["failure"]["stage"] == "evaluate"


@pytest.mark.slow
def test_a_damaged_build_is_not_published(
    cli: CommandLine, quick: Path, finished: Path, tmp_path: Path
) -> None:
    """One flipped bit in a finished shard is found before anything is published."""
    workspace = tmp_path / "damaged"
    shutil.copytree(finished, workspace)
    shard = entries(workspace / "checkpoint", "*.safetensors")[0]
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 1
    shard.write_bytes(data)
    target = tmp_path / "published"
    done = cli.run(
        *("run", quick, "--source", tiny_glm_path(), "--workspace", workspace),
        *("--publish", target),
        expect=1,
    )
    assert shard.name in done.stderr
    assert "sha256" in done.stderr
    assert not target.exists()


def test_a_run_in_a_workspace_that_is_taken_says_who_has_it(
    cli: CommandLine, quick: Path, tmp_path: Path
) -> None:
    """Two runs never share a workspace."""
    workspace = Workspace(tmp_path / "taken")
    workspace.create()
    with workspace.locked():
        done = cli.run(
            *("run", quick, "--source", tiny_glm_path(), "--workspace", workspace.root),
            expect=1,
        )
    assert str(os.getpid()) in done.stderr
    assert "already working" in done.stderr
