"""Publishing to S3: boto3 against SeaweedFS, a server that refuses what AWS refuses."""

import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from glm_quant.artifact import FileDigest
from glm_quant.errors import IntegrityError, PublishError
from glm_quant.hub.bucket import S3Target
from glm_quant.hub.retry import Patience
from glm_quant.hub.s3 import S3Source
from tests.hub_server.proxy import Proxy
from tests.s3_server import KEYS, connect

QUICK = Patience(tries=4, first_seconds=0.01, longest_seconds=0.05)
PART = 5 << 20  # the smallest that S3 takes
SHARD = "model-00001-of-00002.safetensors"
SMALL_SHARD = "model-00002-of-00002.safetensors"
_numbers = itertools.count(1)


@pytest.fixture
def bucket(client: Any) -> str:
    name = f"builds-{os.getpid()}-{next(_numbers)}"
    client.create_bucket(Bucket=name)
    return name


@pytest.fixture
def build(tmp_path: Path) -> Path:
    """Give a folder that looks like a build; its first shard takes three parts."""
    folder = tmp_path / "build"
    (folder / "assets").mkdir(parents=True)
    (folder / SHARD).write_bytes(random.Random(1).randbytes(2 * PART + 1000))
    (folder / SMALL_SHARD).write_bytes(random.Random(2).randbytes(1000))
    for name in ("README.md", "assets/recipe.png", "config.json", "manifest.json"):
        (folder / name).write_text(name)
    return folder


def digests(folder: Path) -> list[FileDigest]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [FileDigest.of(folder, str(path.relative_to(folder))) for path in paths]


def digest_of(folder: Path, name: str) -> FileDigest:
    return FileDigest.of(folder, name)


def target(
    client: Any, bucket: str, tmp_path: Path, build_id: str = "abc", **kind: Any
) -> S3Target:
    return S3Target(
        bucket,
        "models/glm",
        build_id=build_id,
        ledgers=tmp_path / "ledgers",
        client=client,
        patience=QUICK,
        part_bytes=PART,
        **kind,
    )


def keys(client: Any, bucket: str) -> set[str]:
    listed = client.list_objects_v2(Bucket=bucket, Prefix="models/glm/").get("Contents", ())
    return {entry["Key"].removeprefix("models/glm/") for entry in listed}


def recording(weed: tuple[str, int]) -> tuple[Any, list[str]]:
    """A client, and what it sends: the names of the calls."""
    client, calls = connect(f"http://{weed[0]}:{weed[1]}", seconds=20), list[str]()
    client.meta.events.register("before-call.s3.*", lambda model, **_: calls.append(model.name))
    return client, calls


def test_latest_names_a_whole_build(client: Any, bucket: str, build: Path, tmp_path: Path) -> None:
    """Uploaded shards are not visible; LATEST comes last; each object carries its sha256."""
    place = target(client, bucket, tmp_path)
    place.upload(build, digest_of(build, SHARD))
    assert place.visible().files == {}
    assert keys(client, bucket) == {f"builds/abc/{SHARD}"}
    published = place.publish(build, digests(build))
    assert keys(client, bucket) == {"LATEST"} | {f"builds/abc/{f.path}" for f in digests(build)}
    latest = json.loads(client.get_object(Bucket=bucket, Key="models/glm/LATEST")["Body"].read())
    assert latest["manifest_sha256"] == digest_of(build, "manifest.json").sha256
    seen = place.visible().files
    assert {name: file.sha256 for name, file in seen.items()} == {
        file.path: file.sha256 for file in digests(build)
    }
    assert len(published.diff.added) == len(digests(build))
    assert place.publish(build, digests(build)).diff.is_empty


def test_uploads_of_builds_that_were_given_up_are_swept(
    client: Any, bucket: str, build: Path, tmp_path: Path
) -> None:
    """Shards and parts of a build that was never published go, not those of one that was.

    Nor what is younger, which another machine may be sending, nor what has no name of ours.
    """
    given_up, half_sent, published = "0" * 12, "1" * 12, "2" * 12
    target(client, bucket, tmp_path, published).publish(build, digests(build))
    target(client, bucket, tmp_path, given_up).upload(build, digest_of(build, SMALL_SHARD))
    root = "models/glm/builds"
    key = f"{root}/{half_sent}/{SHARD}"
    upload = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    part = {"PartNumber": 1, "UploadId": upload, "Body": b"x"}
    client.upload_part(Bucket=bucket, Key=key, **part)
    client.put_object(Bucket=bucket, Key=f"{root}/not-ours/{SHARD}", Body=b"x")
    (build / "config.json").write_text("new")
    assert target(client, bucket, tmp_path, "def").leftovers() == ()
    target(client, bucket, tmp_path, "def", keep_previous=True).publish(build, digests(build))
    old: Any = {"given_up_after": timedelta(0), "keep_previous": True}
    place = target(client, bucket, tmp_path, "def", **old)
    assert place.leftovers() == (f"builds/{given_up}", f"builds/{half_sent}")
    place.publish(build, digests(build))
    assert {name.split("/")[1] for name in keys(client, bucket) if "/" in name} == {
        *(published, "def", "not-ours")
    }
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")
    assert place.leftovers() == ()


def test_a_published_build_is_read_by_its_prefix(
    client: Any, bucket: str, build: Path, tmp_path: Path
) -> None:
    """The source follows LATEST, and fetches bytes that are proved."""
    target(client, bucket, tmp_path).publish(build, digests(build))
    source = S3Source(bucket, "models/glm", tmp_path / "cache", client=client, patience=QUICK)
    assert source.uri == f"s3://{bucket}/models/glm/builds/abc"
    assert source.files()[SHARD].sha256 == digest_of(build, SHARD).sha256
    assert source.acquire(SHARD).read_bytes() == (build / SHARD).read_bytes()
    source.release(SHARD)


@pytest.mark.parametrize("keep_previous", [False, True])
def test_a_newer_build_takes_over(
    client: Any, bucket: str, build: Path, tmp_path: Path, weed: Any, keep_previous: bool
) -> None:
    """What both share is copied by the bucket; the earlier build goes unless it is to stay."""
    target(client, bucket, tmp_path).publish(build, digests(build))
    (build / "config.json").write_text("new")
    watched, calls = recording(weed)
    place = target(watched, bucket, tmp_path, "def", keep_previous=keep_previous)
    other = "models/glm/builds/other/on-its-way"
    client.put_object(Bucket=bucket, Key=other, Body=b"x")
    (build / SHARD).rename(tmp_path / "kept")
    kept = FileDigest.of(tmp_path, "kept").model_copy(update={"path": SHARD})
    published = place.publish(build, [kept, *digests(build)])
    assert [change.name for change in published.diff.changed] == ["config.json"]
    assert "UploadPart" not in calls
    builds = {key.split("/")[1] for key in keys(client, bucket) if "/" in key}
    assert builds == {"def", "other", *(["abc"] if keep_previous else [])}


UPLOAD = """
import sys
from pathlib import Path
from glm_quant.artifact import FileDigest
from glm_quant.hub.bucket import S3Target
folder, bucket, ledgers, name = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
target = S3Target(bucket, "models/glm", build_id="abc", ledgers=ledgers, part_bytes=5 << 20)
target.upload(folder, FileDigest.of(folder, name))
"""


def test_a_killed_upload_sends_only_missing_parts(
    client: Any, bucket: str, build: Path, tmp_path: Path, weed: tuple[str, int]
) -> None:
    """After kill -9 between parts, another process sends the rest; strays of others are ended."""
    (build / SHARD).write_bytes(random.Random(3).randbytes(9 * PART))
    ledgers, key = tmp_path / "ledgers", f"models/glm/builds/abc/{SHARD}"
    stray = client.create_multipart_upload(Bucket=bucket, Key=key)["UploadId"]
    url = f"http://{weed[0]}:{weed[1]}"
    env = {**os.environ, **KEYS, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-c", UPLOAD, str(build), bucket, str(ledgers), SHARD]
    process = subprocess.Popen(command, env=env)

    def noted() -> int:
        (ledger,) = list(ledgers.glob("*.parts.json")) or [None]
        return len(json.loads(ledger.read_bytes())["parts"]) if ledger else 0

    while noted() < 2:
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    had = noted()
    assert 2 <= had < 9
    watched, calls = recording(weed)
    target(watched, bucket, tmp_path).upload(build, digest_of(build, SHARD))
    assert calls.count("UploadPart") == 9 - had
    assert "CreateMultipartUpload" not in calls
    got = client.get_object(Bucket=bucket, Key=key)
    assert hashlib.sha256(got["Body"].read()).hexdigest() == digest_of(build, SHARD).sha256
    left = client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])
    assert stray not in [upload["UploadId"] for upload in left]
    assert list(ledgers.iterdir()) == []


def test_parts_of_a_file_that_changed_are_sent_again(
    client: Any, bucket: str, build: Path, tmp_path: Path, weed: Any
) -> None:
    """A ledger does not vouch for other bytes: a part is told by its sha256."""
    place = target(client, bucket, tmp_path)
    file, data = digest_of(build, SHARD), (build / SHARD).read_bytes()
    (build / SHARD).write_bytes(data[:-1] + b"x")
    with pytest.raises(IntegrityError, match=rf"{SHARD}: the record says sha256 {file.sha256}"):
        place.upload(build, file)
    assert client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []
    assert keys(client, bucket) == set()


def test_cut_lines_are_borne(
    client: Any, bucket: str, build: Path, tmp_path: Path, weed: tuple[str, int]
) -> None:
    """Each call is made again after a lost answer; the build is whole."""
    with Proxy(weed) as proxy:
        lossy = connect(proxy.url, seconds=2)
        lost = iter([True, False] * 40)

        def lose(http_response: Any, parsed: Any, model: Any, **_: Any) -> None:
            if model.name in ("UploadPart", "CompleteMultipartUpload", "PutObject") and next(lost):
                from botocore.exceptions import ReadTimeoutError

                raise ReadTimeoutError(endpoint_url="")

        lossy.meta.events.register("after-call.s3.*", lose)
        place = target(lossy, bucket, tmp_path)
        place.publish(build, digests(build))
    assert target(client, bucket, tmp_path).publish(build, digests(build)).diff.is_empty
    assert client.list_multipart_uploads(Bucket=bucket).get("Uploads", []) == []


def test_somebody_else_s_latest_is_noticed(
    client: Any, bucket: str, build: Path, tmp_path: Path, weed: Any
) -> None:
    """If-Match: a LATEST that changed between reading and writing is read again, not run over."""
    target(client, bucket, tmp_path).publish(build, digests(build))
    watched, _ = recording(weed)
    (build / "config.json").write_text("new")
    place = target(watched, bucket, tmp_path, "def")
    for file in digests(build):
        place.upload(build, file)
    writes = itertools.count()

    def race(params: Any, **_: Any) -> None:
        if params["url_path"].endswith("LATEST") and next(writes) == 0:
            target(client, bucket, tmp_path, "ghi").publish(build, digests(build))

    watched.meta.events.register("before-call.s3.PutObject", race)
    place.publish(build, digests(build))
    assert place.visible().revision == "builds/def"
    assert next(writes) == 2
    assert {key.split("/")[1] for key in keys(client, bucket) if "/" in key} == {"def"}


def test_strangers_are_left_alone(client: Any, bucket: str, build: Path, tmp_path: Path) -> None:
    """A model, or a LATEST, that is not ours is refused and stays."""
    client.put_object(Bucket=bucket, Key="models/glm/model.safetensors", Body=b"theirs")
    with pytest.raises(PublishError, match="it holds a model that is no build of glm-quant"):
        target(client, bucket, tmp_path).publish(build, digests(build))
    client.delete_object(Bucket=bucket, Key="models/glm/model.safetensors")
    client.put_object(Bucket=bucket, Key="models/glm/LATEST", Body=b'{"prefix": "../.."}')
    with pytest.raises(PublishError, match="LATEST: this is not of glm-quant"):
        target(client, bucket, tmp_path).publish(build, digests(build))
    assert keys(client, bucket) == {"LATEST"}


def test_refusals_are_told_without_the_secret(
    weed: tuple[str, int], bucket: str, build: Path, tmp_path: Path
) -> None:
    """A wrong secret, and a bucket that is not there, at once."""
    url = f"http://{weed[0]}:{weed[1]}"
    wrong = connect(url, "AnotherSecretOfTheTests", seconds=20)
    with pytest.raises(PublishError, match="Check the credentials") as caught:
        target(wrong, bucket, tmp_path).publish(build, digests(build))
    assert "AnotherSecretOfTheTests" not in str(caught.value)
    with pytest.raises(PublishError, match="404 NoSuchBucket"):
        target(connect(url, seconds=20), "no-such-bucket", tmp_path).publish(build, digests(build))
    with pytest.raises(PublishError, match="4 tries in a row failed"):
        target(connect("http://127.0.0.1:1"), bucket, tmp_path).visible()
