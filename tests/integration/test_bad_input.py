"""Bad input through the command line: one clear message, the right exit code, nothing lost.

Most run the command in this process (typer's runner); where a process matters, it is a real one.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from flows.cli.main import app
from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.data import tiny_glm_path
from tests.hub_server import HubServer
from tests.plain import PLAIN

from ..conftest import Edit

COMMAND = str(Path(sys.executable).with_name("glm-quant"))
EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"

HOLD = """
import sys, time
from pathlib import Path
from glm_quant.workspace import Workspace
from tests.plain import PLAIN
workspace = Workspace(Path(sys.argv[1]))
workspace.create()
with workspace.locked():
    print("held", flush=True)
    time.sleep(60)
"""


def refused(*arguments: str | Path, code: int) -> str:
    """Run a command that must fail, and return what it says."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    said = " ".join(result.stderr.split())
    assert result.exit_code == code, f"{result.exit_code}: {said} {result.exception!r}"
    assert isinstance(result.exception, SystemExit), f"{result.exception!r}"
    assert "Traceback" not in result.output
    assert not result.stdout
    assert 0 < len(said) < 1000
    return said


def refuse_convert(source: Path, output: Path, recipe: str | Path = PLAIN, code: int = 2) -> str:
    return refused("convert", "--source", source, "--recipe", recipe, "--output", output, code=code)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out" / "build"


@pytest.fixture
def good_output(small: Path, output: Path) -> dict[str, str]:
    """Give the digests of a good build that stands in `output`."""
    options = ["--source", str(small), "--recipe", PLAIN, "--output", str(output)]
    result = CliRunner().invoke(app, ["convert", *options])
    assert result.exit_code == 0, result.stderr
    return contents(output)


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def shard_of(source: Path, tensor: str) -> Path:
    return source / Checkpoint.open(source).index.weight_map[tensor]


def change_index(source: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((source / INDEX_NAME).read_bytes())
    change(index["weight_map"])
    (source / INDEX_NAME).write_text(json.dumps(index))


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_missing_shard(command: str, small_copy: Path, output: Path) -> None:
    """A shard that is not there is named, with how many are missing of how many."""
    (small_copy / "model-00003-of-00029.safetensors").unlink()
    arguments = ["--output", output] if command == "convert" else []
    said = refused(command, "--source", small_copy, "--recipe", PLAIN, *arguments, code=2)
    assert "MissingTensorError" in said
    assert "1 of 29 shards are missing, the first is model-00003-of-00029.safetensors" in said
    assert not output.exists()


def test_truncated_shard(small_copy: Path, output: Path) -> None:
    """A shard that was cut is named, with the place that the header claims and the file's size."""
    path = shard_of(small_copy, EXPERT)
    size = path.stat().st_size
    os.truncate(path, size - 1000)
    said = refuse_convert(small_copy, output)
    assert f"HeaderError {path.name}: tensor " in said
    assert f"the file has {size - 1000:,}" in said
    assert "The download stopped early; fetch the file again." in said
    os.truncate(path, 100)
    said = refuse_convert(small_copy, output)
    assert "the header claims" in said
    assert "the file has 100 in all" in said
    os.truncate(path, 0)
    assert "the file has 0" in refuse_convert(small_copy, output)
    assert not output.exists()


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b'"BF16"', b'"BOOL"', "needs"),
        (b'"BF16"', b'"FOUR"', "dtype 'FOUR' is not one of"),
        (b'"data_offsets"', b'"data_offset$"', "data_offsets None is no list"),
        (b'"shape":[64,128]', b'"shape":[-4,128]', "shape [-4, 128] is no list of natural numbers"),
        (b'"shape":[64,128]', b'"shape":[128,64]', "config.json implies [64, 128]"),
        (b"{", b"[", "the header is not JSON"),
    ],
)
def test_lying_header(small_copy: Path, output: Path, old: bytes, new: bytes, message: str) -> None:
    """A header that contradicts its file or the config is refused before anything is made."""
    path = shard_of(small_copy, EXPERT)
    data = path.read_bytes()
    length = 8 + int.from_bytes(data[:8], "little")
    head = data[8:length].replace(old, new, 1)
    assert head != data[8:length]
    path.write_bytes(data[:8] + head + data[length:])
    said = refuse_convert(small_copy, output)
    assert path.name in said
    assert message in said
    assert not output.exists()


def test_tensor_absent_from_the_index(small_copy: Path, output: Path) -> None:
    """A tensor that the index does not name is named, with both counts."""
    change_index(small_copy, lambda weight_map: weight_map.pop(EXPERT))
    said = refuse_convert(small_copy, output)
    assert f"MissingTensorError {INDEX_NAME}: tensor {EXPERT} is missing" in said


def test_tensor_absent_from_its_shard(small_copy: Path, output: Path) -> None:
    """A tensor that the index places in another shard than the one that holds it is named."""
    other = "model-00001-of-00029.safetensors"
    holder = shard_of(small_copy, EXPERT).name
    change_index(small_copy, lambda weight_map: weight_map.update({EXPERT: other}))
    said = refuse_convert(small_copy, output)
    assert f"{holder}: it holds tensor {EXPERT}, which {INDEX_NAME} places in {other}" in said


def test_index_that_leaves_the_folder(small_copy: Path, output: Path) -> None:
    """An index with a path in it is not followed."""
    change_index(small_copy, lambda weight_map: weight_map.update({EXPERT: "../x.safetensors"}))
    said = refuse_convert(small_copy, output)
    assert f"tensor '{EXPERT}' lies in '../x.safetensors', which is no plain" in said


@pytest.mark.parametrize(("bits", "count"), [(0x7FC0, 1), (0x7F80, 1), (0xFF80, 3)])
def test_nan_and_inf(
    small_copy: Path,
    output: Path,
    edit_tensor: Callable[[Path, str, Edit], str],
    bits: int,
    count: int,
) -> None:
    """NaN and Inf are found while streaming: shard, tensor and how many are named.

    What was finished before is kept, and with the shard fetched again the same command completes.
    """
    original = shard_of(small_copy, EXPERT).read_bytes()

    def spoil(values: np.ndarray) -> None:
        values[1000 : 1000 + count] = bits

    shard = edit_tensor(small_copy, EXPERT, spoil)
    said = refuse_convert(small_copy, output)
    assert f"WeightError {shard}: tensor {EXPERT}: {count} of 8,192 values are NaN or Inf" in said
    assert "row 7, column 104" in said
    assert not (output / "manifest.json").exists()
    (small_copy / shard).write_bytes(original)
    options = ["--source", str(small_copy), "--recipe", PLAIN, "--output", str(output)]
    assert CliRunner().invoke(app, ["convert", *options]).exit_code == 0


def test_value_beyond_float16(
    small_copy: Path, output: Path, edit_tensor: Callable[[Path, str, Edit], str]
) -> None:
    """An indexer weight that float16 cannot hold is named, with both numbers and the way out."""
    name = "model.layers.0.self_attn.indexer.wq_b.weight"

    def enlarge(values: np.ndarray) -> None:
        values[5] = 0x4780  # 65,536 as bfloat16

    shard = edit_tensor(small_copy, name, enlarge)
    said = refuse_convert(small_copy, output)
    assert f"WeightError {shard}: tensor {name}: the largest magnitude is 65536" in said
    assert "F16 ends at 65504" in said
    assert "`dtype: source`" in said


def test_unknown_architecture(small_copy: Path, output: Path) -> None:
    """A model_type that mlx-lm has not is named, with the nearest that it has."""
    config = json.loads((small_copy / "config.json").read_bytes())
    (small_copy / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_mole"}))
    refusal = refuse_convert(small_copy, output)
    assert "CheckpointError config.json: model_type is 'qwen3_mole'" in refusal
    assert "The nearest that it has: qwen3_moe" in refusal


def test_a_config_of_another_architecture(small_copy: Path, output: Path) -> None:
    """What mlx-lm's model class misses in a config is told in its words."""
    config = json.loads((small_copy / "config.json").read_bytes())
    (small_copy / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_moe"}))
    refusal = refuse_convert(small_copy, output)
    assert "mlx_lm.models.qwen3_moe of mlx-lm" in refusal
    assert "'num_experts'" in refusal


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_wrong_recipe(command: str, small: Path, output: Path, tmp_path: Path) -> None:
    """A mistake in a recipe is named with file and line, and so is a recipe that is not there."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("name: mine\ndescription: x\nrules:\n  - group: norms\n    bits: 7\n")
    arguments = ["--output", output] if command == "convert" else []
    said = refused(command, "--source", small, "--recipe", recipe, *arguments, code=2)
    assert f"RecipeError {recipe}:4: rules.0: bits is 7; MLX has 2, 3, 4, 5, 6, 8" in said
    said = refused(command, "--source", small, "--recipe", "2.56", *arguments, code=2)
    assert "2.56: there is no such recipe" in said
    assert "dynamic-2.56bpw" in said


@pytest.mark.parametrize("command", ["convert", "plan"])
def test_source_that_is_not_there(command: str, tmp_path: Path, output: Path) -> None:
    """A folder that does not exist, or that is no checkpoint, is named."""
    arguments = ["--recipe", PLAIN, *(["--output", output] if command == "convert" else [])]
    said = refused(command, "--source", tmp_path / "none", *arguments, code=2)
    assert f"SourceError {tmp_path / 'none'}: there is no such folder" in said
    said = refused(command, "--source", tmp_path, *arguments, code=2)
    assert "there is no config.json, so this is no checkpoint" in said


def test_no_workers(small: Path, output: Path) -> None:
    """Fewer than one worker is bad input."""
    options = ("--source", small, "--recipe", PLAIN, "--output", output)
    said = refused("convert", *options, "--workers", "-1", code=2)
    assert "-1 workers cannot work" in said or "Invalid value" in said


def test_output_that_holds_something_else(small: Path, output: Path) -> None:
    """A folder with other things is refused by the name of one, and stays as it was."""
    output.mkdir(parents=True)
    (output / "model.safetensors").write_bytes(b"somebody's weights")
    before = contents(output.parent)
    said = refuse_convert(small, output)
    assert f"OutputError {output}: the folder holds something else (model.safetensors)" in said
    assert contents(output.parent) == before
    shutil.rmtree(output)
    output.write_text("a file")
    assert "this is a file. Choose a folder for --output." in refuse_convert(small, output)
    assert output.read_text() == "a file"


def test_output_replaced_by_something_else(
    small: Path, output: Path, good_output: dict[str, str]
) -> None:
    """Somebody else's shards in the place of an earlier build of ours are not deleted."""
    shutil.rmtree(output)
    output.mkdir()
    (output / "weights.safetensors").write_bytes(b"somebody's weights")
    said = refuse_convert(small, output)
    assert "the folder holds something else (weights.safetensors)" in said
    assert contents(output) == {
        "weights.safetensors": hashlib.sha256(b"somebody's weights").hexdigest()
    }


def test_second_run_in_the_same_workspace(small: Path, output: Path) -> None:
    """A second run is refused with the number of the process that works there."""
    output.parent.mkdir(parents=True)
    state = output.with_name(f".{output.name}.glm-quant")
    command = [sys.executable, "-c", HOLD, str(state)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        said = refuse_convert(small, output, code=1)
        other.kill()
    assert f"BusyError {state}: process {other.pid} is already working here" in said
    assert not output.exists()


def test_no_space_beforehand(small: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is too small is named with both numbers before anything is written."""
    monkeypatch.setattr(
        "glm_quant.artifact.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0)
    )
    said = refuse_convert(small, output, code=1)
    assert "DiskSpaceError" in said
    assert "the build needs 0.00 GB, the disk has 0.00 GB free" in said
    assert not output.exists()


def in_small_disk(folder: Path, size: str, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command while `folder` is a disk of its own, of that size (its own namespace)."""
    script = f'mount -t tmpfs -o size={size} tmpfs "$0" && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(folder), *command],
        capture_output=True,
        text=True,
        check=False,
    )


def in_read_only_disk(
    folder: Path, *command: str, prefect_home: Path
) -> subprocess.CompletedProcess[str]:
    """Run a command while `folder` is an empty disk that cannot be written (its own namespace)."""
    script = 'mount -t tmpfs -o size=1m tmpfs "$0" && mount -o remount,ro "$0" && exec "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(folder), *command],
        env=os.environ | {"PREFECT_HOME": str(prefect_home), "PREFECT_API_URL": ""},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("what", ["workspace", "output", "PREFECT_HOME"])
def test_read_only_disk(small: Path, tmp_path: Path, what: str) -> None:
    """One sentence with the path, and exit code 2, before anything is started."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None or in_small_disk(disk, "1m", "true").returncode:
        pytest.skip("no read-only disk can be mounted here")
    home = disk if what == "PREFECT_HOME" else tmp_path
    arguments = {
        "workspace": ["run", PLAIN, "--workspace", str(disk / "work")],
        "output": ["convert", "--recipe", PLAIN, "--output", str(disk / "build")],
        "PREFECT_HOME": ["run", PLAIN, "--workspace", str(tmp_path / "work")],
    }[what]
    source = tmp_path / "source"
    shutil.copytree(small, source)
    (source / "tokenizer.json").write_bytes((tiny_glm_path() / "tokenizer.json").read_bytes())
    command = [COMMAND, *arguments, "--source", str(source)]
    refusal = in_read_only_disk(disk, *command, prefect_home=home / "prefect")
    assert refusal.returncode == 2, refusal.stderr
    assert refusal.stderr.startswith(f"OutputError {disk}/"), refusal.stderr
    assert "does not let this user write or read here (Read-only file system)" in refusal.stderr
    assert "Choose another folder" in refusal.stderr
    assert len(refusal.stderr.splitlines()) == 1


def test_disk_that_fills_up(small: Path, tmp_path: Path, good_output: dict[str, str]) -> None:
    """A disk that fills up on the way is named; with more room the same command goes on.

    The disk is a real one of 1.5 MB; the check beforehand is made to believe it is larger.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    if shutil.which("unshare") is None or in_small_disk(disk, "1m", "true").returncode:
        pytest.skip("no small disk can be mounted here")
    script = (
        "import shutil, sys; usage = shutil.disk_usage\n"
        "shutil.disk_usage = lambda p: usage('/')\n"
        "from flows.cli.main import main; main()\n"
    )
    options = ["--source", str(small), "--recipe", PLAIN, "--output", str(disk / "build")]
    python = [sys.executable, "-c", script, "convert", *options]
    steps = (
        '"$@"; code=$?; test $code = 1 || exit 99; ls -A "$0"; '
        'mount -o remount,size=64m "$0" && "$@" && sha256sum "$0"/build/*.safetensors'
    )
    found = in_small_disk(disk, "1500k", "sh", "-c", steps, str(disk), *python)
    assert found.returncode == 0, found.stderr
    assert "DiskSpaceError" in found.stderr
    assert "the disk is full (No space left on device" in " ".join(found.stderr.split())
    assert "Traceback" not in found.stderr
    assert ".build.glm-quant" in found.stdout
    made = dict(reversed(line.split()) for line in found.stdout.splitlines() if "build/" in line)
    shards = {name: digest for name, digest in good_output.items() if "safetensors" in name}
    shards.pop("model.safetensors.index.json", None)
    assert {Path(path).name: digest for path, digest in made.items()} == shards


def test_good_output_survives(
    small_copy: Path,
    small: Path,
    output: Path,
    good_output: dict[str, str],
    edit_tensor: Callable[[Path, str, Edit], str],
) -> None:
    """A finished build stays whole when a later run into it is refused or fails."""
    (small_copy / "model-00003-of-00029.safetensors").unlink()
    refuse_convert(small_copy, output)
    refuse_convert(small, output, "no-such-recipe")
    assert contents(output) == good_output
    result = CliRunner().invoke(app, ["verify", str(output), "--source", str(small), "--json"])
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["files"] == len(good_output) - 1


def test_verify_names_what_is_wrong(output: Path, good_output: dict[str, str]) -> None:
    """A changed, missing or stray shard gives exit code 1; a folder that is no output gives 2."""
    shard = next(path for path in sorted(output.glob("*.safetensors")))
    good = shard.read_bytes()
    shard.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert f"IntegrityError {shard}: the record says sha256" in refused("verify", output, code=1)
    shard.write_bytes(good[:-1])
    said = refused("verify", output, code=1)
    assert f"the record says {len(good):,} bytes, the file has {len(good) - 1:,}" in said
    shard.unlink()
    assert f"{shard}: the file is missing" in refused("verify", output, code=1)
    shard.write_bytes(good)
    stray = output / "model-00099-of-00099.safetensors"
    stray.write_bytes(good)
    assert f"{stray}: a stray shard (1 in all)" in refused("verify", output, code=1)
    said = refused("verify", output.parent, code=2)
    assert "there is no manifest.json, so this is no finished output" in said


def test_real_process(small_copy: Path, output: Path) -> None:
    """As a process of its own: exit code 2, the message on stderr, stdout empty, no traceback."""
    (small_copy / "config.json").unlink()
    found = subprocess.run(
        [COMMAND, "convert", "--source", small_copy, "--recipe", PLAIN, "--output", output],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 2
    assert found.stdout == ""
    assert found.stderr.startswith("CheckpointError ")
    assert "Traceback" not in found.stderr


def test_status_of_nothing(tmp_path: Path) -> None:
    """A folder in which nothing was planned is bad input."""
    said = refused("status", tmp_path, code=2)
    assert "nothing was planned here yet" in said


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["run", "no-such-recipe"], "RecipeError no-such-recipe: there is no such recipe"),
        (["run", PLAIN, "--source", "/no/such/folder"], "SourceError /no/such/folder"),
        (["run", PLAIN, "--source", "hf://org/none"], "SourceError"),
    ],
)
def test_run_judges_its_input_before_a_server(
    tmp_path: Path, arguments: list[str], error: str
) -> None:
    """What cannot be made ends with exit code 2, and Prefect was not even asked for a database."""
    with HubServer() as hub:
        refusal = subprocess.run(
            [COMMAND, *arguments, "--workspace", str(tmp_path / "work")],
            env=os.environ
            | {
                "PREFECT_HOME": str(tmp_path / "prefect"),
                "PREFECT_API_URL": "",
                "HF_ENDPOINT": hub.url,
            },
            capture_output=True,
            text=True,
            check=False,
        )
    assert refusal.returncode == 2, refusal.stderr
    assert refusal.stderr.startswith(error), refusal.stderr
    assert not (tmp_path / "prefect").exists()
