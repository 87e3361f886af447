"""The Hub as a source: driven over real sockets, with everything that goes wrong on the way."""

import hashlib
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import httpx2
import pytest
from huggingface_hub import snapshot_download

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.data import tiny_glm_path
from glm_quant.errors import SourceError
from glm_quant.hub.huggingface import HubSource
from glm_quant.hub.retry import Patience
from glm_quant.quantize.verify import verify
from glm_quant.recipe import Recipe
from tests.hub_server import Content, Fault, HubServer
from tests.plain import PLAIN
from tests.synthetic import small_config, write_checkpoint

QUICK = Patience(tries=5, first_seconds=0.01, longest_seconds=0.05)
SECONDS = httpx2.Timeout(0.6)
TOKEN = "hf_" + "PlantedSecretThatMustNotLeak"
SHARD = "model.safetensors"
SIZE = 3_000_000
DATA = random.Random(3).randbytes(SIZE)
CONVERT = [str(Path(sys.executable).with_name("glm-quant")), "convert"]


@pytest.fixture
def hub() -> Generator[HubServer]:
    with HubServer(token=TOKEN) as server:
        server.add_commit("org/one", {SHARD: Content.of_bytes(DATA), "config.json": CONFIG})
        yield server


CONFIG = Content.of_bytes(b'{"model_type": "glm_moe_dsa"}')


def open_hub(hub: HubServer, cache: Path | None, repo: str = "org/one", **how: object) -> HubSource:
    options = {"patience": QUICK, "timeout": SECONDS, "token": TOKEN} | how
    return HubSource(repo, "main", cache, endpoint=hub.url, **options)  # pyright: ignore


def ranges(hub: HubServer) -> list[str | None]:
    """The ranges that the CDN was asked for."""
    return [request.range for request in hub.requests("^/cdn/")]


def same_build(one: Path, other: Path) -> None:
    """Two builds are equal byte for byte, but for what the manifest says of where they are from."""
    names = sorted(path.name for path in one.iterdir())
    assert names == sorted(path.name for path in other.iterdir())
    for name in names:
        if name != "manifest.json":
            assert (one / name).read_bytes() == (other / name).read_bytes(), name
    manifests = [json.loads((folder / "manifest.json").read_bytes()) for folder in (one, other)]
    for manifest in manifests:
        assert manifest.pop("source")
        assert manifest.pop("source_files")
        assert manifest.pop("seal")
    assert manifests[0] == manifests[1]


def test_the_server_satisfies_the_real_client(hub: HubServer, small: Path, tmp_path: Path) -> None:
    """huggingface_hub's own snapshot_download gets every byte from it, page by page."""
    hub.page = 10
    hub.add_folder("org/small", small)
    snapshot_download("org/small", endpoint=hub.url, local_dir=tmp_path / "got", token=False)
    for path in small.iterdir():
        assert (tmp_path / "got" / path.name).read_bytes() == path.read_bytes()


def test_files_carry_what_the_hub_promises(hub: HubServer) -> None:
    """Sizes of all, sha256 of LFS files, git's id of the others; the commit stands in the URI."""
    source = open_hub(hub, None)
    shard, config = source.files()[SHARD], source.files()["config.json"]
    assert (shard.size_bytes, shard.sha256) == (SIZE, hashlib.sha256(DATA).hexdigest())
    assert shard.identity == f"sha256:{shard.sha256}"
    assert (config.sha256, config.identity) == (None, f"git:{CONFIG.git_oid}")
    assert source.uri == f"hf://org/one@{hub.repos['org/one'].branches['main']}"


FAULTS: dict[str, list[Fault]] = {
    "dropped": [Fault("drop", after=1_000_001, times=3)],
    "reset in the body": [Fault("reset", after=1_000_001, times=3)],
    "reset before the answer": [Fault("reset_before", times=3)],
    "reset of the resolver": [Fault("reset_before", path="/resolve/", times=3)],
    "stalled": [Fault("stall", after=500_000, times=2)],
    "429 and Retry-After": [Fault("status", status=429, headers={"Retry-After": "1"})],
    "429 of the resolver": [
        Fault("status", path="/resolve/", status=429, headers={"RateLimit": '"resolvers";r=0;t=1'})
    ],
    "500": [Fault("status", status=500, times=3)],
    "503 of the resolver": [Fault("status", path="/resolve/", status=503, times=3)],
    "an expired address": [Fault("expired_link", path="/resolve/", times=2)],
    "expired halfway": [Fault("drop", after=900_000), Fault("status", status=403)],
    "short": [Fault("short", after=700_000, times=2)],
    "long": [Fault("long", after=5_000, times=2)],
    "corrupt": [Fault("corrupt", after=2_000_000)],
    "ignored range": [Fault("drop", after=1_500_000), Fault("ignore_range", times=2)],
    "ignored range, dropped again": [
        Fault("drop", after=1_500_000),
        Fault("ignore_range"),
        Fault("drop", after=100_000),
    ],
    "another range": [Fault("drop", after=1_000_000), Fault("shift", after=9)],
    "everything": [
        Fault("drop", after=100_000),
        Fault("status", path="/resolve/", status=502),
        Fault("corrupt", after=300_000),
        Fault("reset", after=400_000),
        Fault("ignore_range"),
        Fault("stall", after=200_000),
        Fault("expired_link", path="/resolve/"),
        Fault("short", after=1_000_000),
    ],
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_ends_in_the_right_bytes(hub: HubServer, tmp_path: Path, name: str) -> None:
    """A shard comes out whole and equal, and nothing else is left on disk."""
    source = open_hub(hub, tmp_path)
    hub.fault(*FAULTS[name])
    begin = time.monotonic()
    path = source.acquire(SHARD)
    assert path.read_bytes() == DATA
    if name.startswith("429"):
        assert time.monotonic() - begin >= 1, "it did not wait as long as it was asked to"
    source.release(SHARD)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", [n for n in FAULTS if n not in ("corrupt", "expired halfway")])
def test_every_fault_of_a_small_read_ends_in_the_right_bytes(hub: HubServer, name: str) -> None:
    """Headers and other ranges have the same patience."""
    source = open_hub(hub, None)
    hub.fault(*FAULTS[name])
    if name != "everything":
        assert source.read(SHARD, 1_000_000, 2_600_000) == DATA[1_000_000:2_600_000]
    assert source.read(SHARD) == DATA


@pytest.mark.parametrize("kind", ["drop", "reset", "stall"])
def test_a_cut_download_goes_on_from_the_byte(hub: HubServer, tmp_path: Path, kind: str) -> None:
    """The next try asks for what is missing, not for what is there."""
    source = open_hub(hub, tmp_path)
    hub.fault(Fault(kind, after=1_000_000))  # pyright: ignore[reportArgumentType]
    source.acquire(SHARD)
    first, second = ranges(hub)
    assert first is None
    assert second is not None
    # A reset throws away what the kernel had received and we had not read yet.
    assert 0 < int(second.removeprefix("bytes=").partition("-")[0]) <= 1_000_000


def test_a_server_that_ignores_ranges_is_borne(hub: HubServer, tmp_path: Path) -> None:
    """What is there is skipped in its answer: neither the part nor a try is lost."""
    source = open_hub(hub, tmp_path)
    hub.fault(Fault("drop", after=1_000_000), Fault("ignore_range", times=9))
    assert source.acquire(SHARD).read_bytes() == DATA
    assert len(ranges(hub)) == 2
    assert source.read(SHARD, 500_000, 600_000) == DATA[500_000:600_000]
    assert len(ranges(hub)) == 3


def test_another_range_than_asked_is_not_taken(hub: HubServer) -> None:
    """Where no digest will judge, what the answer announces decides."""
    source = open_hub(hub, None)
    hub.fault(Fault("shift", after=9))
    assert source.read(SHARD, 500_000, 600_000) == DATA[500_000:600_000]
    assert len(ranges(hub)) == 2


def test_content_that_stays_wrong_is_refused_with_both_digests(
    hub: HubServer, tmp_path: Path
) -> None:
    """Twice wrong is not the network's fault; nothing is left on disk."""
    wrong = bytearray(DATA)
    wrong[2_000_000] ^= 0x10
    source = open_hub(hub, tmp_path)
    hub.fault(Fault("corrupt", after=2_000_000, times=9))
    promised, found = (hashlib.sha256(data).hexdigest() for data in (DATA, bytes(wrong)))
    with pytest.raises(SourceError, match=f"{promised}.*{found}"):
        source.acquire(SHARD)
    assert list(tmp_path.iterdir()) == []
    hub.fault(Fault("corrupt", path="config.json", after=3, times=9))
    with pytest.raises(SourceError, match=rf"config\.json.*{CONFIG.git_oid}"):
        source.read("config.json")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault("status", status=503, times=99), "answered 503"),
        (Fault("reset_before", times=99), "5 tries in a row failed"),
        (Fault("status", status=403, times=99), "answered 403"),
        (Fault("status", path="/resolve/", status=404), "answered 404"),
        (Fault("status", path="/resolve/", status=403), "gated"),
    ],
)
def test_giving_up_is_bounded_and_clear(
    hub: HubServer, tmp_path: Path, fault: Fault, said: str
) -> None:
    """What does not pass ends in one message that names the file, without the signed address."""
    source = open_hub(hub, tmp_path)
    hub.fault(fault)
    with pytest.raises(SourceError, match=said) as caught:
        source.acquire(SHARD)
    assert SHARD in str(caught.value)
    assert "Signature" not in str(caught.value)


def test_a_branch_that_moves_changes_nothing(hub: HubServer, tmp_path: Path) -> None:
    """The commit is pinned when the source is opened; who opens later sees the new one."""
    source = open_hub(hub, tmp_path / "a")
    hub.fault(Fault("drop", after=1_000_000))
    threading.Timer(
        0.01, lambda: hub.add_commit("org/one", {SHARD: Content.of_bytes(b"new" * 999)})
    ).start()
    assert source.acquire(SHARD).read_bytes() == DATA
    assert source.read("config.json", 0, 5) == b'{"mod'
    later = open_hub(hub, tmp_path / "b")
    assert later.uri != source.uri
    assert later.acquire(SHARD).read_bytes() == b"new" * 999


@pytest.mark.parametrize(
    ("repo", "revision", "token", "said"),
    [
        ("org/none", "main", TOKEN, "no such repository"),
        ("org/private", "main", "hf_other", "no such repository, or it is private"),
        ("org/one", "v2", TOKEN, "no revision v2"),
    ],
)
def test_what_cannot_be_opened_is_named(
    hub: HubServer, small: Path, repo: str, revision: str, token: str, said: str
) -> None:
    """Each with its way out, at once."""
    hub.add_folder("org/private", small, private=True)
    with pytest.raises(SourceError, match=said):
        HubSource(repo, revision, endpoint=hub.url, token=token, patience=QUICK)


def test_a_gated_repository_says_so_at_the_first_file(hub: HubServer, small: Path) -> None:
    """Its list is public, its files are not."""
    hub.add_folder("org/gated", small, gated=True)
    with pytest.raises(SourceError, match="hf auth login"):
        open_hub(hub, None, "org/gated", token="hf_other").read("config.json")
    assert open_hub(hub, None, "org/gated").read("config.json")


def test_opening_has_patience(hub: HubServer) -> None:
    """A Hub that is busy for a moment is no reason to stop."""
    hub.fault(Fault("status", path="^/api/models/", status=503, times=2))
    hub.fault(Fault("reset_before", path="^/api/models/"))
    assert open_hub(hub, None).files()


def test_the_token_goes_to_the_hub_alone(hub: HubServer, tmp_path: Path) -> None:
    """Not to the CDN, where the Hub sends us on to."""
    open_hub(hub, tmp_path).acquire(SHARD)
    asked = {request.path.split("/")[1]: request.authorization for request in hub.log}
    assert asked["org"] == asked["api"] == f"Bearer {TOKEN}"
    assert asked["cdn"] is None


KILLED = """
import sys
from pathlib import Path
from glm_quant.hub.huggingface import HubSource
HubSource("org/one", cache=Path(sys.argv[2]), endpoint=sys.argv[1], token="x").acquire(sys.argv[3])
"""


def test_kill_9_and_on_from_the_byte(hub: HubServer, tmp_path: Path) -> None:
    """A killed process leaves a part; the next process asks for exactly the rest."""
    hub.rate = 3_000_000
    process = subprocess.Popen([sys.executable, "-c", KILLED, hub.url, str(tmp_path), SHARD])
    while not any(path.stat().st_size >= 1_048_576 for path in tmp_path.glob("*.part")):
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (part,) = tmp_path.glob("*.part")
    have = part.stat().st_size
    hub.rate = None
    assert open_hub(hub, tmp_path).acquire(SHARD).read_bytes() == DATA
    assert 0 < have < SIZE
    assert ranges(hub)[-1] == f"bytes={have}-{SIZE - 1}"


@pytest.mark.parametrize("place", [0, 700_000, 1_048_575])
def test_a_bit_flipped_in_the_part_is_caught(hub: HubServer, tmp_path: Path, place: int) -> None:
    """What a process that died left behind is not trusted but hashed."""
    source = open_hub(hub, tmp_path, patience=Patience(tries=1))
    hub.fault(Fault("drop", after=1_048_576))
    with pytest.raises(SourceError, match="tries in a row"):
        source.acquire(SHARD)
    (part,) = tmp_path.glob("*.part")
    data = bytearray(part.read_bytes())
    data[place] ^= 1
    part.write_bytes(data)
    assert open_hub(hub, tmp_path).acquire(SHARD).read_bytes() == DATA


# Whole conversions


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_glm_path()


@pytest.fixture(scope="module")
def tiny_build(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the command line makes of the tiny checkpoint in a folder."""
    output = tmp_path_factory.mktemp("tiny") / "build"
    command = [*CONVERT, "--source", str(tiny), "--recipe", PLAIN, "--output", str(output)]
    subprocess.run(command, check=True, capture_output=True)
    return output


class Watch:
    """Looks at a folder all the time and counts the shards in it."""

    def __init__(self, folder: Path) -> None:
        self.most = 0
        self._folder = folder
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(0.001):
            self.most = max(self.most, len(set(self._shards())))

    def _shards(self) -> Iterator[str]:
        if self._folder.exists():
            for name in os.listdir(self._folder):  # noqa: PTH208 - nothing may be slower here
                if not name.endswith(".marks"):
                    yield name.removesuffix(".part")


@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_conversion_from_the_hub_equals_one_from_a_folder(
    hub: HubServer,
    small: Path,
    tmp_path: Path,
    demo_recipe: Recipe,
    prepare: Callable[..., object],
    window: int,
) -> None:
    """Same bytes, never more than the window on disk, and through a storm of faults."""
    folder = prepare(small, tmp_path / "folder", demo_recipe)
    folder.complete_all()  # pyright: ignore
    folder.assemble()  # pyright: ignore
    hub.add_folder("org/small", small)
    source = open_hub(hub, tmp_path / "hub" / "source", "org/small", window=window)
    made = prepare(source, tmp_path / "hub", demo_recipe)
    for kind in ("drop", "reset", "corrupt", "short"):
        hub.fault(Fault(kind, after=70_000, skip=random.Random(kind).randrange(20)))  # pyright: ignore
    with Watch(tmp_path / "hub" / "source") as watch:
        made.complete_all()  # pyright: ignore
    made.assemble()  # pyright: ignore
    same_build(tmp_path / "folder" / "checkpoint", tmp_path / "hub" / "checkpoint")
    assert watch.most == window
    assert verify(made.output, source, samples=8).rederived_blocks == 8  # pyright: ignore
    assert not (tmp_path / "hub" / "source").exists()


def test_shards_that_the_recipe_drops_are_not_fetched(
    hub: HubServer, tmp_path: Path, demo_recipe: Recipe, prepare: Callable[..., object]
) -> None:
    """Of a shard with nothing but MTP tensors the header is read, and no more."""
    write_checkpoint(tmp_path / "mtp", small_config(), shard_bytes=290_000)
    hub.add_folder("org/mtp", tmp_path / "mtp")
    source = open_hub(hub, tmp_path / "work" / "source", "org/mtp")
    made = prepare(source, tmp_path / "work", demo_recipe)
    checkpoint: Checkpoint = made.checkpoint  # pyright: ignore
    headers = [request.file for request in hub.requests("^/cdn/")]
    assert sorted(headers) == checkpoint.index.shards, "headers of all shards come first"
    made.complete_all()  # pyright: ignore
    weight_map = checkpoint.index.weight_map
    mtp = {weight_map[name] for name in weight_map if name.startswith("model.layers.4.")}
    needed = {weight_map[n] for n in weight_map if not n.startswith("model.layers.4.")}
    assert len(mtp - needed) >= 2
    for shard in checkpoint.index.shards:
        asked = [request.range for request in hub.requests(f"^/cdn/.* {shard}$")]
        assert len(asked) == (2 if shard in needed else 1), shard
    large = [s for s in mtp - needed if checkpoint.files[s].size_bytes > 256 << 10]
    assert large
    for shard in large:
        assert [r.range for r in hub.requests(f"^/cdn/.* {shard}$")] == ["bytes=0-262143"]


def test_the_command_line_reads_from_the_hub_and_keeps_the_secret(
    hub: HubServer, tiny: Path, tiny_build: Path, tmp_path: Path
) -> None:
    """A private repository by HF_TOKEN; the token is in no output, log, record or manifest."""
    hub.add_folder("org/tiny", tiny, private=True)
    env = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    common = ["--recipe", PLAIN, "--verbose"]
    command = [*CONVERT, "--source", "hf://org/tiny@main", *common]
    command += ["--output", str(tmp_path / "hub")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    same_build(tiny_build, tmp_path / "hub")
    commit = hub.repos["org/tiny"].branches["main"]
    manifest = json.loads((tmp_path / "hub" / "manifest.json").read_bytes())
    assert manifest["source"] == f"hf://org/tiny@{commit}"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 15
    for path in written:
        assert TOKEN.encode() not in path.read_bytes(), path
    assert TOKEN not in said
    assert "Signature" not in said
    env["HF_TOKEN"] = "hf_other"
    refused = [*CONVERT, "--source", "hf://org/tiny", *common, "--output", str(tmp_path / "no")]
    done = subprocess.run(refused, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no such repository, or it is private" in done.stderr.replace("\n", " ")


def test_log_lines_have_no_secrets(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Neither the token nor a signed address is in a log line of ours, whatever goes wrong."""
    caplog.set_level(logging.DEBUG, logger="glm_quant")
    hub.fault(*FAULTS["everything"])
    open_hub(hub, tmp_path).acquire(SHARD)
    ours = [record for record in caplog.records if record.name.startswith("glm_quant")]
    assert any("try 2" in record.getMessage() for record in ours)
    assert any("fetched" in record.getMessage() for record in ours)
    for record in ours:
        assert TOKEN not in record.getMessage()
        assert "Signature" not in record.getMessage()


def test_a_conversion_that_was_killed_goes_on(
    hub: HubServer, tiny: Path, tiny_build: Path, tmp_path: Path
) -> None:
    """kill -9 while shards come in, twice; then the same command ends in the same bytes."""
    hub.add_folder("org/tiny", tiny)
    env = {**os.environ, "HF_ENDPOINT": hub.url}
    command = [*CONVERT, "--source", "hf://org/tiny@main", "--recipe", PLAIN, "--output"]
    output = tmp_path / "hub"
    cache = tmp_path / ".hub.glm-quant" / "source"
    hub.rate = 8_000_000
    for wanted in (1, 2):
        hub.log.clear()
        process = subprocess.Popen([*command, str(output)], env=env, stderr=subprocess.DEVNULL)
        while len({r.file for r in hub.requests("^/cdn/") if _is_whole(r.range)}) <= wanted:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    shutil.copy(tiny / "config.json", cache / "leftover-of-nobody")
    hub.rate = None
    subprocess.run([*command, str(output)], env=env, check=True, capture_output=True)
    same_build(tiny_build, output)
    assert not cache.exists()


def _is_whole(asked: str | None) -> bool:
    return asked is None or asked != "bytes=0-262143"
