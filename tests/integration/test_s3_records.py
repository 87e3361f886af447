"""Records of a build in S3, and the lease on them: boto3 against SeaweedFS."""

import itertools
import os
import time
from pathlib import Path
from typing import Any

import pytest

from glm_quant.artifact import Record
from glm_quant.errors import BusyError, PublishError
from glm_quant.hub.records import SharedRecords, is_shared
from glm_quant.hub.retry import Patience
from glm_quant.workspace import Workspace

QUICK = Patience(tries=3, first_seconds=0.01, longest_seconds=0.05)
LEASE_SECONDS = 2.0
_numbers = itertools.count(1)


@pytest.fixture
def uri(client: Any) -> str:
    name = f"records-{os.getpid()}-{next(_numbers)}"
    client.create_bucket(Bucket=name)
    return f"s3://{name}/builds/mine"


@pytest.fixture
def here(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "here")


@pytest.fixture
def there(tmp_path: Path) -> Workspace:
    """The workspace of another machine: another folder, since one machine runs the tests."""
    return Workspace(tmp_path / "there")


def shared(uri: str, workspace: Workspace, client: Any, seconds: float = LEASE_SECONDS) -> Any:
    return SharedRecords(uri, workspace, seconds, client=client, patience=QUICK)


def note(workspace: Workspace, name: str, fingerprint: str) -> None:
    Record(fingerprint=fingerprint).save(workspace.records / name)


def noted(workspace: Workspace) -> dict[str, str]:
    folder = workspace.records
    found = {str(p.relative_to(folder)): Record.load(p) for p in folder.rglob("*.json")}
    return {name: record.fingerprint for name, record in found.items() if record is not None}


def wait_for_renewals(client: Any, uri: str, count: int) -> None:
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    seen, deadline = set[str](), time.monotonic() + 300
    while len(seen) < count:
        assert time.monotonic() < deadline, "the lease is not renewed"
        seen.add(client.head_object(Bucket=bucket, Key=f"{prefix}/lease.json")["ETag"])
        time.sleep(0.1)


def test_another_machine_finds_what_was_recorded(
    client: Any, uri: str, here: Workspace, there: Workspace
) -> None:
    """All records but those of one machine's disk; what is deleted goes there too."""
    note(here, "gone.json", "1")
    with shared(uri, here, client):
        note(here, "plan.json", "a")
        note(here, "shards/model-1.safetensors.json", "b")
        note(here, "uploads/0123/model-1.safetensors.json", "c")
        for mine in ("failure", "restored/model-1.safetensors", "shards/x.safetensors.elsewhere"):
            note(here, f"{mine}.json", "mine")
        wait_for_renewals(client, uri, 3)
        (here.records / "gone.json").unlink()
    with shared(uri, there, client):
        assert noted(there) == {
            "plan.json": "a",
            "shards/model-1.safetensors.json": "b",
            "uploads/0123/model-1.safetensors.json": "c",
        }
        note(there, "plan.json", "newer")
    with shared(uri, here, client):
        assert noted(here)["plan.json"] == "newer"


def test_two_machines_do_not_work_at_a_time(
    client: Any, uri: str, here: Workspace, there: Workspace
) -> None:
    """The second is told who works and since when; a lease is renewed for as long as one does."""
    with shared(uri, here, client):
        wait_for_renewals(client, uri, 6)  # longer than one lease
    # A lease that no machine is too slow to renew in time.
    with (
        shared(uri, here, client, seconds=3600),
        pytest.raises(BusyError, match=r"process \d+ of .* works on this build"),
    ):
        shared(uri, there, client, seconds=3600).__enter__()


def test_who_went_silent_is_followed_and_stops(
    client: Any, uri: str, here: Workspace, there: Workspace
) -> None:
    """A machine that slept finds that another took over, and neither renews nor copies any more."""
    asleep = shared(uri, here, client, seconds=3600)  # renews after a quarter of an hour
    with asleep:
        time.sleep(LEASE_SECONDS + 1)
        with shared(uri, there, client):
            asleep._renew()
            note(here, "late.json", "late")
            with pytest.raises(BusyError, match="has taken this build over"):
                asleep.require_held()
    with shared(uri, there, client):
        assert "late.json" not in noted(there)


def test_the_same_workspace_goes_on_at_once(client: Any, uri: str, here: Workspace) -> None:
    """After a kill: its lock says that nobody else works in it, and its own records are newer."""
    killed = shared(uri, here, client, seconds=3600)
    note(here, "plan.json", "old")
    killed.__enter__()
    killed._push()
    note(here, "plan.json", "new")
    with shared(uri, here, client, seconds=3600):
        assert noted(here)["plan.json"] == "new"
    killed._closing.set()


@pytest.mark.parametrize("name", ["../x.json", "a/../../x.json", "/x.json", "a//x.json", "x.sh"])
def test_a_key_is_no_path(name: str) -> None:
    """What leads out of the folder, which AWS lets into a bucket, or is no record, is left."""
    assert not is_shared(name)


def test_what_is_no_record_is_not_fetched(
    client: Any, uri: str, here: Workspace, tmp_path: Path
) -> None:
    """Hidden files and programs that somebody put beside the records stay where they are."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    for key in (".hidden.json", "run.sh", "failure.json"):
        client.put_object(Bucket=bucket, Key=f"{prefix}/records/{key}", Body=b"{}")
    with shared(uri, here, client):
        assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_not_ours_is_refused(client: Any, uri: str, here: Workspace) -> None:
    """A prefix with a lease of something else, a bucket that is not there."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    client.put_object(Bucket=bucket, Key=f"{prefix}/lease.json", Body=b"who?")
    with pytest.raises(PublishError, match="not of glm-quant"):
        shared(uri, here, client).__enter__()
    with pytest.raises(PublishError, match="no-such-bucket"):
        shared("s3://no-such-bucket/x", here, client).__enter__()
