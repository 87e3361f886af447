"""What the tests share: the real release's metadata, a small checkpoint, and a real conversion."""

import fcntl
import hashlib
import json
import lzma
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import settings

from glm_quant.checkpoint.header import ITEM_SIZE
from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.checkpoint.source import SourceFile
from glm_quant.errors import SourceError
from glm_quant.model.geometry import Geometry
from glm_quant.model.precision import require_float32
from glm_quant.quantize.assemble import assemble
from glm_quant.quantize.convert import Conversion
from glm_quant.quantize.plan import Plan, make_plan
from glm_quant.recipe import Recipe, load_recipe
from glm_quant.workspace import Workspace
from tests.plain import PLAIN
from tests.synthetic import small_config, write_checkpoint

# Tests hold float32 results against float32 references.
require_float32()
settings.register_profile("quick", max_examples=60, deadline=None)
settings.load_profile("quick")

FIXTURES = Path(__file__).parent / "fixtures" / "glm-5.2"

Edit = Callable[[np.ndarray], None]


@dataclass(frozen=True)
class MemorySource:
    """A source whose files are in memory: config and index need no disk."""

    contents: Mapping[str, bytes]
    uri: str = field(default="memory")
    places: int | None = field(default=None)

    def files(self) -> Mapping[str, SourceFile]:
        return {
            name: SourceFile(name, len(data), f"memory:{len(data)}")
            for name, data in self.contents.items()
        }

    def read(self, name: str, begin: int = 0, end: int | None = None) -> bytes:
        return self.contents[name][begin:end]

    def expect(self, names: Sequence[str]) -> None:
        pass

    def acquire(self, name: str) -> Path:
        raise SourceError(f"{name}: it is in memory only.")

    def release(self, name: str) -> None:
        pass


@dataclass
class Made:
    """A conversion that was carried out, and what to look at."""

    workspace: Workspace
    conversion: Conversion
    checkpoint: Checkpoint
    recipe: Recipe

    @property
    def plan(self) -> Plan:
        return self.conversion.plan

    @property
    def output(self) -> Path:
        return self.workspace.checkpoint

    @property
    def shard_files(self) -> list[Path]:
        return [self.output / shard.name for shard in self.plan.shards]

    def complete_all(self) -> None:
        self.workspace.create()
        for shard in range(len(self.plan.shards)):
            self.conversion.complete(shard)

    def assemble(self) -> None:
        assemble(self.conversion, self.checkpoint, self.recipe, self.output)
        self.conversion.clean()


def run_command(
    *arguments: str | Path, expect: int = 0, folder: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `glm-quant` as a user does, to its end, and hold it to an exit code."""
    program = Path(sys.executable).with_name("glm-quant")
    done = subprocess.run(
        [program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
        cwd=folder,
    )
    assert done.returncode == expect, done.stdout + done.stderr
    return done


def leave_litter(folder: Path) -> None:
    """Leave in a folder what macOS, Windows and Linux leave there."""
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "._notes.txt"):
        (folder / name).write_bytes(b"\0litter")
    for name in (".Spotlight-V100", ".fseventsd", ".Trashes", "lost+found"):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "inside.json").write_bytes(b"\0litter")
    for path in [*folder.glob("[!.]*.safetensors"), *folder.glob("[!.]*.json")]:
        path.with_name(f"._{path.name}").write_bytes(b"\0litter")  # exFAT: one a file


@pytest.fixture(scope="session")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with config.json and index of zai-org/GLM-5.2, and no weights."""
    folder = tmp_path_factory.mktemp("release")
    shutil.copy(FIXTURES / "config.json", folder)
    (folder / INDEX_NAME).write_bytes(lzma.decompress((FIXTURES / f"{INDEX_NAME}.xz").read_bytes()))
    return folder


@pytest.fixture(scope="session")
def release_tensors() -> dict[str, tuple[tuple[int, ...], str]]:
    """Give shape and dtype of the 3,355 tensors of the 2.56 bpw build by name."""
    text = lzma.decompress((FIXTURES / "output_tensors_2.56.tsv.xz").read_bytes()).decode()
    rows = (line.split("\t") for line in text.splitlines()[1:])
    return {
        name: (tuple(int(n) for n in shape.strip("()").split(",") if n.strip()), dtype)
        for name, shape, dtype in rows
    }


@pytest.fixture(scope="session")
def index_only() -> Callable[[dict[str, Any], int], Checkpoint]:
    """Give a function that makes a checkpoint of config and index alone."""

    def make(config: dict[str, Any], tensors_per_shard: int = 7) -> Checkpoint:
        geometry = Geometry.from_config(config)
        names = sorted(n for n, _, _ in [*geometry.tensors(), *geometry.mtp_tensors()])
        weight_map = {
            name: f"model-{1 + i // tensors_per_shard:05d}.safetensors"
            for i, name in enumerate(names)
        }
        index = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
        return Checkpoint(
            MemorySource({"config.json": json.dumps(config).encode(), INDEX_NAME: index})
        )

    return make


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a checkpoint of 5 MB in 29 shards; experts straddle them. Not to be written to."""
    folder = tmp_path_factory.mktemp("small") / "small-glm"
    write_checkpoint(folder, small_config(), shard_bytes=190_000)
    return folder


@pytest.fixture
def small_copy(small: Path, tmp_path: Path) -> Path:
    """Give a copy of the small checkpoint that a test may break."""
    return Path(shutil.copytree(small, tmp_path / "small-glm"))


@pytest.fixture(scope="session")
def demo_recipe() -> Recipe:
    """Give the demo's rules with shards small enough that the small checkpoint fills several."""
    return load_recipe(PLAIN).model_copy(update={"shard_bytes": 300_000})


def with_quantizer(recipe: Recipe, quantizer: str) -> Recipe:
    """Return a recipe whose affine rules all use one quantizer."""
    rules = tuple(rule.model_copy(update={"quantizer": None}) for rule in recipe.rules)
    return recipe.model_copy(update={"quantizer": quantizer, "rules": rules})


@pytest.fixture(scope="session")
def prepare() -> Callable[..., Made]:
    """Give a function that plans a conversion and does nothing yet."""

    def make(source: Path, folder: Path, recipe: Recipe, workers: int | None = 1) -> Made:
        checkpoint = Checkpoint.open(source)
        plan = make_plan(checkpoint, recipe)
        workspace = Workspace(folder)
        conversion = Conversion(checkpoint, plan, workspace, workers)
        return Made(workspace, conversion, checkpoint, recipe)

    return make


@pytest.fixture(scope="session")
def made_once(
    small: Path,
    tmp_path_factory: pytest.TempPathFactory,
    demo_recipe: Recipe,
    prepare: Callable[..., Made],
) -> Path:
    """Give a folder with the small checkpoint and a finished build of it. Not to be written to."""
    folder = tmp_path_factory.mktemp("made")
    shutil.copytree(small, folder / small.name)
    finished = prepare(folder / small.name, folder / "work", demo_recipe)
    finished.complete_all()
    finished.assemble()
    return folder


@pytest.fixture
def made(
    made_once: Path,
    small_copy: Path,
    tmp_path: Path,
    demo_recipe: Recipe,
    prepare: Callable[..., Made],
) -> Made:
    """Give a finished build of the small checkpoint that a test may break."""
    shutil.copytree(made_once / small_copy.name, small_copy, dirs_exist_ok=True)
    shutil.copytree(made_once / "work", tmp_path / "work")
    finished = prepare(small_copy, tmp_path / "work", demo_recipe)
    assert all(finished.conversion.outputs.finished(i) for i in range(len(finished.plan.shards)))
    return finished


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of stock mlx-lm and the OpenAI client, in an environment of their own.

    Whichever process of a test run needs it first makes it, for the others too.
    """
    uv = shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    backend = "mlx" if sys.platform == "darwin" else "mlx[cpu]"
    wanted = [f"mlx-lm[evaluate]=={version('mlx-lm')}", f"{backend}=={version('mlx')}", "openai>=2"]
    name = hashlib.sha256(" ".join([sys.version, *wanted]).encode()).hexdigest()[:12]
    folder = tmp_path_factory.getbasetemp().parent / f"stock-{name}"
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "whole").exists():
            shutil.rmtree(folder, ignore_errors=True)
            subprocess.run([uv, "venv", "-q", "--python", sys.executable, folder], check=True)
            python = str(folder / "bin" / "python")
            done = subprocess.run(
                [uv, "pip", "install", "-q", "--python", python, *wanted],
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode and os.environ.get("CI"):
                pytest.fail(done.stderr)
            if done.returncode:
                pytest.skip(f"the package index cannot be reached: {done.stderr[-300:]}")
            (folder / "whole").touch()
    return folder / "bin"


@pytest.fixture(scope="session")
def edit_tensor() -> Callable[[Path, str, Edit], str]:
    """Give a function that changes a tensor's values in place; it returns the shard's name."""

    def edit(folder: Path, name: str, change: Edit) -> str:
        info = Checkpoint.open(folder).tensors[name]
        path = folder / info.shard
        data = bytearray(path.read_bytes())
        item = ITEM_SIZE[info.dtype]
        view = np.frombuffer(data, {1: np.uint8, 2: np.uint16, 4: np.uint32}[item])
        change(view[info.begin // item : info.end // item])
        path.write_bytes(data)
        return info.shard

    return edit
