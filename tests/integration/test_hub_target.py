"""Publishing to the Hub: the real client against a server that refuses what the Hub refuses."""

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Generator
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import HfApi

from glm_quant.artifact import FileDigest
from glm_quant.errors import GlmQuantError, IntegrityError, PublishError
from glm_quant.hub import open_target
from glm_quant.hub.repository import HubTarget
from glm_quant.hub.retry import Patience
from glm_quant.hub.target import compare
from tests.hub_server import Content, Fault, HubServer

REPO = "org/build"
TOKEN = "hf_PlantedTokenOfTheTests"
WORK = "glm-quant-abc"
QUICK = Patience(tries=5, first_seconds=0.01, longest_seconds=0.05)
SHARDS = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
OTHERS = ("README.md", "assets/recipe.png", "config.json", "manifest.json", "tokenizer.json")


@pytest.fixture(autouse=True)
def plain_http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)


@pytest.fixture
def hub() -> Generator[HubServer]:
    with HubServer(token=TOKEN) as running:
        yield running


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """Give a folder that looks like a build: the second shard is sent in three parts."""
    return write_build(tmp_path / "build", 1)


def write_build(folder: Path, seed: int) -> Path:
    (folder / "assets").mkdir(parents=True)
    for i, name in enumerate(SHARDS):
        (folder / name).write_bytes(random.Random(seed + i).randbytes((90, 700, 150)[i] * 1000))
    for name in OTHERS:
        (folder / name).write_text(f"{seed} of {name}")
    (folder / "README.md").write_text(f"---\nlicense: mit\n---\nbuild {seed}\n")
    return folder


def digests(folder: Path) -> list[FileDigest]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [FileDigest.of(folder, str(path.relative_to(folder))) for path in paths]


def target(hub: HubServer, build_id: str = "abc", token: str = TOKEN, private: bool = False):
    return HubTarget(
        REPO, build_id=build_id, endpoint=hub.url, token=token, patience=QUICK, private=private
    )


def shown(hub: HubServer, branch: str = "main") -> dict[str, str]:
    repo = hub.repos[REPO]
    files = repo.commits[repo.branches[branch]]
    return {name: file.sha256 for name, file in files.items() if name != ".gitattributes"}


def wanted(folder: Path) -> dict[str, str]:
    return {file.path: file.sha256 for file in digests(folder)}


def upload_all(hub: HubServer, build: Path) -> None:
    for file in digests(build):
        if file.path in SHARDS:
            target(hub).upload(build, file)


def sent(hub: HubServer) -> int:
    """Bytes of large files that came in."""
    return sum(request.received for request in hub.requests("^/lfs/put"))


def test_nobody_sees_half_a_build(hub: HubServer, build: Path, tmp_path: Path) -> None:
    """Whoever lists main, at any time, finds the earlier build or the new one, nothing between."""
    target(hub).publish(build, digests(build))
    first = shown(hub)
    newer = write_build(tmp_path / "newer", 2)
    (newer / SHARDS[2]).unlink()
    api, seen, stop = HfApi(endpoint=hub.url, token=TOKEN), set[frozenset[str]](), threading.Event()

    def watch() -> None:
        while not stop.is_set():
            tree = api.list_repo_tree(REPO, recursive=True)
            seen.add(frozenset(f"{f.path} {f.blob_id}" for f in tree if hasattr(f, "blob_id")))

    watcher = threading.Thread(target=watch)
    watcher.start()
    hub.rate = 2_000_000
    published = target(hub, "def").publish(newer, digests(newer))
    time.sleep(0.1)
    stop.set()
    watcher.join()
    assert len(seen) == 2
    assert first == wanted(build)
    assert shown(hub) == wanted(newer)
    assert [change.name for change in published.diff.deleted] == [SHARDS[2]]
    assert list(hub.repos[REPO].branches) == ["main"]


def test_uploaded_shards_are_copied_by_the_hub(hub: HubServer, build: Path) -> None:
    """Local copies may go after the upload; the visible commit sends only what is small."""
    files = digests(build)
    upload_all(hub, build)
    assert shown(hub) == {}
    whole, before = wanted(build), sent(hub)
    for name in SHARDS:
        (build / name).unlink()
    published = target(hub).publish(build, files)
    assert shown(hub) == whole
    assert sent(hub) - before == sum(
        f.size_bytes for f in files if f.path.endswith(("png", "r.json"))
    )
    assert published.url == f"{hub.url}/{REPO}/tree/{hub.repos[REPO].branches['main']}"


def test_a_second_time_changes_nothing(hub: HubServer, build: Path) -> None:
    """Publishing what is there makes no commit, in whatever process."""
    target(hub).publish(build, digests(build))
    commits, before = len(hub.repos[REPO].commits), sent(hub)
    assert target(hub).publish(build, digests(build)).diff.is_empty
    upload_all(hub, build)
    target(hub).publish(build, digests(build))
    assert (len(hub.repos[REPO].commits), sent(hub)) == (commits, before)
    assert list(hub.repos[REPO].branches) == ["main"]


def test_what_an_earlier_build_shares_is_not_sent(hub: HubServer, build: Path) -> None:
    """A change of one small file moves that file alone; files of other people stay."""
    target(hub).publish(build, digests(build))
    files = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]
    hub.add_commit(REPO, {**files, "notes.txt": Content.of_bytes(b"mine")})
    before = sent(hub)
    (build / "config.json").write_text("new")
    diff = target(hub, "def").publish(build, digests(build)).diff
    assert [change.name for change in diff.changed] == ["config.json"]
    assert (diff.added, diff.deleted, sent(hub)) == ((), (), before)
    assert set(shown(hub)) == {*wanted(build), "notes.txt"}


FAULTS = {
    "create lost": Fault("lose_reply", r"/repos/create"),
    "branch lost": Fault("lose_reply", rf"/branch/{WORK}"),
    "batch 503": Fault("status", r"/objects/batch"),
    "upload cut": Fault("cut_upload", r"/lfs/put/.*/2$", after=100_000),
    "upload refused": Fault("status", r"/lfs/put", status=403),
    "verify lost": Fault("lose_reply", r"/lfs/verify"),
    "commit 503": Fault("status", r"/commit/", times=3, status=503),
    "commit 429": Fault("status", r"/commit/", status=429, headers={"Retry-After": "0.2"}),
    "commit reset": Fault("reset_before", r"/commit/", times=2),
    "commit lost": Fault("lose_reply", r"/commit/", times=3),
    "visible commit lost": Fault("lose_reply", r"/commit/main"),
    "list 500": Fault("status", r"/paths-info/", status=500, times=2),
    "delete lost": Fault("lose_reply", rf"/branch/{WORK}", skip=1),
}


@pytest.mark.parametrize("name", FAULTS)
def test_every_fault_ends_in_the_right_build(hub: HubServer, build: Path, name: str) -> None:
    """Whatever happens once or a few times passes; a lost reply makes no second commit."""
    hub.fault(FAULTS[name])
    begin = time.monotonic()
    target(hub).publish(build, digests(build))
    assert shown(hub) == wanted(build)
    # The empty repository's own, one a shard, and the visible one.
    assert len(hub.repos[REPO].commits) == 1 + len(SHARDS) + 1
    assert list(hub.repos[REPO].branches) == ["main"]
    if "Retry-After" in FAULTS[name].headers:
        assert time.monotonic() - begin > 0.2


def test_a_commit_of_somebody_else_is_noticed(hub: HubServer, build: Path) -> None:
    """The visible commit is refused with 412, made again on top, and keeps what the other did."""
    upload_all(hub, build)
    held = Fault("delay", r"/commit/main", seconds=300)
    hub.fault(held)
    publishing = threading.Thread(target=target(hub).publish, args=(build, digests(build)))
    publishing.start()
    while not hub.requests("/commit/main"):
        time.sleep(0.01)
    hub.add_commit(REPO, {"notes.txt": Content.of_bytes(b"mine")})
    held.until.set()
    publishing.join()
    assert [request.status for request in hub.requests("/commit/main")] == [412, 200]
    assert set(shown(hub)) == {*wanted(build), "notes.txt"}


UPLOAD = """
import sys
from pathlib import Path
from glm_quant.artifact import FileDigest
from glm_quant.hub import open_target
folder = Path(sys.argv[1])
for path in sorted(folder.glob("*.safetensors")):
    open_target(sys.argv[2], "abc").upload(folder, FileDigest.of(folder, path.name))
"""


def test_a_killed_upload_goes_on(hub: HubServer, build: Path) -> None:
    """After kill -9 in the second shard only that one and the third are sent."""
    hub.rate = 300_000
    env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    process = subprocess.Popen([sys.executable, "-c", UPLOAD, str(build), f"hf://{REPO}"], env=env)
    while not hub.requests(r"/lfs/put/.*/2 "):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    hub.rate, before = None, len(hub.requests("^/lfs/put"))
    assert set(shown(hub, WORK)) == {SHARDS[0]}
    upload_all(hub, build)
    sizes = [(build / name).stat().st_size for name in SHARDS]
    again = hub.requests("^/lfs/put")[before:]  # what was on the line at the kill still comes in
    assert sum(request.received for request in again) == sizes[1] + sizes[2]
    target(hub).publish(build, digests(build))
    assert shown(hub) == wanted(build)


def test_a_shard_that_changed_on_disk_is_found_by_the_hub_s_digest(
    hub: HubServer, build: Path
) -> None:
    """Recorded and stored sha256 differ: both are named, and nothing becomes visible."""
    files, recorded = digests(build), wanted(build)[SHARDS[0]]
    (build / SHARDS[0]).write_bytes(b"x" * 90_000)
    stored = wanted(build)[SHARDS[0]]
    with pytest.raises(IntegrityError, match=f"{recorded}.*stored.*{stored}"):
        target(hub).publish(build, files)
    assert shown(hub) == {}


def test_what_is_nowhere_is_named(hub: HubServer, build: Path) -> None:
    """A shard that is neither here nor there stops before anything is visible."""
    files = digests(build)
    (build / SHARDS[1]).unlink()
    with pytest.raises(PublishError, match=rf"{SHARDS[1]}: the shard is neither here nor on"):
        target(hub).publish(build, files)
    assert shown(hub) == {}


def test_a_model_of_somebody_else_is_left_alone(hub: HubServer, build: Path) -> None:
    """Weights without a manifest of ours are refused before anything is sent."""
    hub.add_commit(REPO, {"model.safetensors": Content.of_bytes(b"theirs")})
    with pytest.raises(
        PublishError, match=r"no build of glm-quant \(model\.safetensors and 0 more"
    ):
        target(hub).publish(build, digests(build))
    assert sent(hub) == 0
    assert list(hub.repos[REPO].branches) == ["main"]


@pytest.mark.parametrize(
    ("private", "token", "said"),
    [
        (
            False,
            "hf_AnotherPlantedToken",
            "answered 403 .*no right to write here.*HF_TOKEN",
        ),
        (True, TOKEN, "the recipe says `private: true`, and the repository is public"),
    ],
)
def test_refusals_say_the_way_out_and_no_token(
    hub: HubServer,
    build: Path,
    caplog: pytest.LogCaptureFixture,
    private: bool,
    token: str,
    said: str,
) -> None:
    """Rights and visibility, at once, without the secret in message or log."""
    caplog.set_level(logging.DEBUG)
    hub.add_commit(REPO, {})
    with pytest.raises(PublishError, match=said) as caught:
        target(hub, token=token, private=private).publish(build, digests(build))
    assert token not in str(caught.value) + caplog.text
    assert sent(hub) == 0


def test_a_target_is_judged_by_the_hub_itself(hub: HubServer, build: Path) -> None:
    """Namespace, role, rights and strangers are told beforehand; nothing is written by asking."""
    target(hub).judge(build)
    assert REPO not in hub.repos
    hub.organizations = {"org": "read", "others": "write"}
    with pytest.raises(PublishError, match=r"its role in org is read\. Publish to one of: tester"):
        target(hub).judge(build)
    hub.organizations = {}
    with pytest.raises(PublishError, match=r"its role in org is none\. Publish to one of: tester;"):
        target(hub).judge(build)
    with pytest.raises(PublishError, match="the Hub answered 401"):
        target(hub, token="hf_Wrong").judge(build)
    hub.add_commit(REPO, {"README.md": Content.of_bytes(b"ours")})
    before = dict(hub.repos[REPO].branches)
    target(hub).judge(build)
    assert hub.repos[REPO].branches == before
    assert sent(hub) == 0
    reason = {"X-Error-Message": "Private repository storage limit reached"}
    hub.fault(Fault("status", "/preupload/", status=403, headers=reason))
    with pytest.raises(PublishError, match=r"403 .*storage limit reached"):
        target(hub).judge(build)
    hub.add_commit(REPO, {"model.safetensors": Content.of_bytes(b"theirs")})
    with pytest.raises(PublishError, match="no build of glm-quant"):
        target(hub).judge(build)


def test_a_refusal_while_bytes_are_sent_is_final(hub: HubServer, build: Path) -> None:
    """403 of the Hub itself is told at once, in its words; only a signed address may expire."""
    reason = {"X-Error-Message": "storage patterns tripped our internal systems"}
    hub.fault(Fault("status", "/objects/batch", times=99, status=403, headers=reason))
    with pytest.raises(PublishError, match=r"403 .*storage patterns"):
        target(hub).upload(build, FileDigest.of(build, SHARDS[0]))
    assert len(hub.requests("/objects/batch")) == 1


def test_a_hub_that_echoes_the_token_cannot_make_us_say_it(hub: HubServer, build: Path) -> None:
    """What a server says goes into the message, but for the token."""
    said = {"X-Error-Message": f"pay, {TOKEN}"}
    hub.fault(Fault("status", f"/api/models/{REPO}$", status=402, headers=said))
    with pytest.raises(PublishError, match=r"answered 402 \(.*pay, \*\*\*") as caught:
        target(hub).upload(build, digests(build)[-1])
    assert TOKEN not in str(caught.value)


def test_a_private_repository_is_made_private(hub: HubServer, build: Path) -> None:
    """As the recipe says, from the first upload on."""
    target(hub, private=True).upload(build, digests(build)[-1])
    assert hub.repos[REPO].private


def test_another_branch_may_be_the_visible_one(hub: HubServer, build: Path) -> None:
    """It is created, main is not touched."""
    place = HubTarget(
        REPO, "preview", build_id="abc", endpoint=hub.url, token=TOKEN, patience=QUICK
    )
    place.publish(build, digests(build))
    assert shown(hub, "preview") == wanted(build)
    assert shown(hub) == {}


def test_a_hub_that_stays_away_is_given_up(build: Path) -> None:
    """Bounded, as a failure of publishing."""
    place = HubTarget(REPO, build_id="abc", endpoint="http://127.0.0.1:9", patience=QUICK)
    with pytest.raises(PublishError, match="5 tries in a row failed"):
        place.visible()


def test_a_dry_run_tells_and_writes_nothing(hub: HubServer, build: Path, tmp_path: Path) -> None:
    """Files and bytes to add, to change, to delete, and unchanged; also where nothing is yet."""
    empty = compare(build, digests(build), target(hub).visible().files)
    assert [change.name for change in empty.added] == sorted(wanted(build))
    target(hub).publish(build, digests(build))
    newer = write_build(tmp_path / "newer", 2)
    for name in (SHARDS[2], "tokenizer.json"):
        (newer / name).unlink()
    (newer / SHARDS[0]).write_bytes((build / SHARDS[0]).read_bytes())
    (newer / "vocab.json").write_text("{}")
    before = len(hub.log)
    diff = compare(newer, digests(newer), target(hub).visible().files)
    assert [change.name for change in diff.added] == ["vocab.json"]
    assert [change.name for change in diff.deleted] == [SHARDS[2], "tokenizer.json"]
    assert [change.name for change in diff.unchanged] == [SHARDS[0]]
    assert SHARDS[1] in [change.name for change in diff.changed]
    assert "1 added (0.0 MB)" in diff.describe()
    assert {request.method for request in hub.log[before:]} == {"GET"}


def test_the_staged_build_can_be_read_back(hub: HubServer, build: Path, tmp_path: Path) -> None:
    """From the work branch while there is one, from the published build afterwards."""
    upload_all(hub, build)
    for publish in (False, True):
        if publish:
            target(hub).publish(build, digests(build))
        source = target(hub).staged(tmp_path / "cache")
        assert source.acquire(SHARDS[1]).read_bytes() == (build / SHARDS[1]).read_bytes()
        source.release(SHARDS[1])


@pytest.mark.parametrize(
    ("uri", "said"),
    [("hf://name", "hf://org/name"), ("ftp://host/x", "no targets of kind ftp://")],
)
def test_an_address_that_is_none_is_refused(uri: str, said: str) -> None:
    """With the form that is meant."""
    with pytest.raises(GlmQuantError, match=said):
        open_target(uri, "abc")
