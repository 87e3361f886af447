"""One flipped bit, wherever it is: caught before anything is published, or made again identically.

Each sample is one bit of one file. Which of the two must happen is asserted for each kind of place.
"""

import json
import random
import shutil
from collections.abc import Callable, Generator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest

from glm_quant.build import Build, BuildSpec
from glm_quant.checkpoint.manifest import load_manifest
from glm_quant.errors import CheckpointError, IntegrityError
from glm_quant.hub.huggingface import HubSource
from glm_quant.hub.pin import open_hub
from glm_quant.hub.retry import Patience
from glm_quant.quantize.verify import verify
from glm_quant.recipe import Recipe
from glm_quant.stages.assemble import AssembleStage
from glm_quant.stages.base import Stage
from glm_quant.stages.download import DownloadStage
from glm_quant.stages.plan import PlanStage
from glm_quant.stages.quantize import QuantizeStage
from glm_quant.workspace import Workspace
from tests.hub_server import Fault, HubServer

from ..conftest import Made

CAUGHT = (IntegrityError, CheckpointError)
QUICK = Patience(tries=4, first_seconds=0.01, longest_seconds=0.02)


def flip(path: Path, place: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << bit)]))


@contextmanager
def flipped(path: Path, place: int, bit: int) -> Generator[None]:
    """Flip a bit for as long as the block runs."""
    flip(path, place, bit)
    try:
        yield
    finally:
        flip(path, place, bit)


def places(path: Path, count: int) -> list[tuple[int, int]]:
    """Return byte and bit of the first, the last and other places of a file, always the same."""
    size, chance = path.stat().st_size, random.Random(path.name)
    middle = (chance.randrange(size) for _ in range(count - 2))
    return [(place, chance.randrange(8)) for place in (0, *middle, size - 1)]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def ignore(done: int, total: int) -> None: ...


def stages_of(build: Build) -> list[Stage]:
    """The stages up to a whole checkpoint."""
    shards = range(len(build.plan.shards))
    quantize = [QuantizeStage(build, shard) for shard in shards]
    return [DownloadStage(build), PlanStage(build), *quantize, AssembleStage(build)]


@pytest.fixture(scope="module")
def build(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Give a build that is made and not published; flips in it are undone."""
    folder = tmp_path_factory.mktemp("flips")
    recipe = folder / "flips.yaml"
    recipe.write_text(
        "name: flips\ndescription: experts in 2 bits\nshard_bytes: 300_000\nrules:\n"
        "  - group: routed_experts\n    bits: 2\n  - group: mtp\n    drop: true\n"
        "  - match: .\n    dtype: source\n"
    )
    made = Build(BuildSpec(recipe=str(recipe), source=str(small), workspace=str(folder / "work")))
    made.workspace.create()
    for stage in stages_of(made):
        stage.run(ignore)
    return made


def test_a_finished_output(build: Build) -> None:
    """Every file of an output, the manifest among them: `verify` tells, which publishing asks."""
    output = build.workspace.checkpoint
    verify(output)
    samples = [(path, *at) for path in sorted(output.iterdir()) for at in places(path, 6)]
    assert len(samples) >= 60
    for path, place, bit in samples:
        with flipped(path, place, bit), pytest.raises(CAUGHT) as raised:
            verify(output)
        assert path.name in str(raised.value) or "manifest" in str(raised.value)
    verify(output)


def test_the_records_of_all_stages(build: Build) -> None:
    """A record that is not as it was written is none: its stage is done again."""
    count = 0
    for stage in stages_of(build):
        assert stage.current() is not None
        for place, bit in places(stage.record_path, 8):
            with flipped(stage.record_path, place, bit):
                assert stage.current() is None, (stage.record_path.name, place, bit)
            count += 1
        assert stage.current() is not None
    assert count >= 60


def test_a_shard_whose_record_was_damaged_is_made_again(build: Build) -> None:
    """The same bytes come out, of the shard and of everything that the records say."""
    before = contents(build.workspace.checkpoint)
    stage = QuantizeStage(build, 1)
    record = stage.record_path.read_bytes()
    digest = json.loads(record)["outputs"][0]["sha256"]
    flip(stage.record_path, record.index(digest.encode()) + 7, 0)
    for again in stages_of(build):
        again.run(ignore)
    assert stage.record_path.read_bytes() == record
    assert contents(build.workspace.checkpoint) == before


@pytest.fixture(scope="module")
def half(
    small: Path,
    tmp_path_factory: pytest.TempPathFactory,
    demo_recipe: Recipe,
    prepare: Callable[..., Made],
) -> Path:
    """Give a workspace with finished shards and one that is begun."""
    folder = tmp_path_factory.mktemp("half")
    stopped = prepare(small, folder / "work", demo_recipe)
    stopped.workspace.create()
    for shard in range(len(stopped.plan.shards)):
        stopped.conversion.complete(shard)
        if shard and any(stopped.workspace.partial.glob("*.part")):
            return folder / "work"
    raise AssertionError("no shard was left half done")


@pytest.fixture
def go_on(
    half: Path,
    made_once: Path,
    small: Path,
    tmp_path: Path,
    demo_recipe: Recipe,
    prepare: Callable[..., Made],
) -> Callable[[Path, int, int], bool]:
    """Give a function that flips a bit in a copy of the workspace and finishes the build.

    It says whether the flip was named; either way a second run must end in the same bytes.
    """
    expected = contents(made_once / "work" / "checkpoint")

    def run(file: Path, place: int, bit: int) -> bool:
        folder = tmp_path / "work"
        shutil.copytree(half, folder)
        flip(folder / file, place, bit)
        made = prepare(small, folder, demo_recipe)
        named = False
        try:
            made.complete_all()
        except IntegrityError:
            named = True
            made = prepare(small, folder, demo_recipe)
            made.complete_all()
        made.assemble()
        assert contents(made.output) == expected, (file, place, bit)
        shutil.rmtree(folder)
        return named

    return run


def test_a_partial_output(half: Path, go_on: Callable[[Path, int, int], bool]) -> None:
    """In bytes that are journaled it is named; elsewhere it is overwritten. Same bytes after."""
    (part,) = half.glob("partial/*.part")
    lines = (half / "partial" / "journal.jsonl").read_text().splitlines()[1:]
    shard = int(part.name.split("-")[1]) - 1
    pieces = [p for line in lines for p in json.loads(line)[2] if p[1] == shard]
    ours = part.relative_to(half)
    for tensor, _, offset, size, _ in random.Random(1).sample(pieces, min(4, len(pieces))):
        assert go_on(ours, offset + size // 2, 3), tensor
    done = sorted((offset, offset + size) for _, _, offset, size, _ in pieces)
    gaps = [a[1] for a, b in pairwise(done) if a[1] < b[0]]
    tail = [done[-1][1]] if done[-1][1] < part.stat().st_size else []
    for place in [9, *(gaps + tail)[:3]]:
        assert not go_on(ours, place, 5), place


def test_the_journal(half: Path, go_on: Callable[[Path, int, int], bool]) -> None:
    """A line that is not as it was written, and all after it, count for nothing."""
    journal = half / "partial" / "journal.jsonl"
    (part,) = half.glob("partial/*.part")
    shard = int(part.name.split("-")[1]) - 1
    text = journal.read_bytes()
    ours = [json.loads(line) for line in text.splitlines()[1:]]
    digests = [entry[1] for entry in ours if any(piece[1] == shard for piece in entry[2])]
    # The last bit of a hexadecimal digit: good JSON, and a digest that would go into the manifest.
    flips = [(text.index(digest.encode()) + 9, 0) for digest in digests[:3]]
    assert flips
    for place, bit in [*flips, *places(journal, 6)]:
        assert not go_on(journal.relative_to(half), place, bit)


@pytest.fixture
def hub(small: Path) -> Generator[HubServer]:
    with HubServer() as server:
        server.add_folder("org/small", small)
        yield server


def test_a_source_shard_in_flight_and_on_disk(hub: HubServer, small: Path, tmp_path: Path) -> None:
    """What is fetched is held against the Hub's sha256, also what an earlier process fetched."""
    shard = "model-00003-of-00029.safetensors"
    right = (small / shard).read_bytes()

    def open_it(patience: Patience = QUICK) -> HubSource:
        return HubSource("org/small", cache=tmp_path, endpoint=hub.url, patience=patience)

    for place, _ in places(small / shard, 8):
        hub.fault(Fault("corrupt", after=place))
        source = open_it()
        assert source.acquire(shard).read_bytes() == right
        source.release(shard)
    for place, bit in places(small / shard, 8):
        flip(open_it().acquire(shard), place, bit)
        assert open_it().acquire(shard).read_bytes() == right


def test_the_folder_of_a_source(build: Build, small: Path, tmp_path: Path) -> None:
    """A folder promises nothing; what flips in it later shows where both are compared."""
    copy = Path(shutil.copytree(small, tmp_path / small.name))
    output = build.workspace.checkpoint
    used = list(load_manifest(output).source_files)
    assert verify(output, copy, samples=10**6).rederived_blocks > 100
    for name in used[3:20:5]:
        path = copy / name
        with flipped(path, path.stat().st_size - 1, 6), pytest.raises(CAUGHT):
            verify(output, copy, samples=10**6)


def test_the_pinned_commit(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record of another commit is none: the branch is asked again."""
    workspace = Workspace(tmp_path)

    def here(repo: str, revision: str, *options: object, **more: object) -> HubSource:
        return HubSource(repo, revision, *options, endpoint=hub.url, patience=QUICK, **more)  # pyright: ignore

    monkeypatch.setattr("glm_quant.hub.pin.HubSource", here)
    source = open_hub("hf://org/small", workspace, 1)
    source.acquire("model-00003-of-00029.safetensors")
    asked = len(hub.requests(f"/revision/{source.uri.partition('@')[2]}"))
    for place, bit in places(workspace.pin, 8):
        with flipped(workspace.pin, place, bit):
            assert open_hub("hf://org/small", workspace, 1).uri == source.uri
    assert len(hub.requests(f"/revision/{source.uri.partition('@')[2]}")) == asked
