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
folder, bucket, name = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
target = S3Target(bucket, "models/glm", build_id="abc", part_bytes=5 << 20)
target.upload(folder, FileDigest.of(folder, name))
"""


def test_a_killed_upload_is_sent_again(
    client: Any, bucket: str, build: Path, tmp_path: Path, weed: tuple[str, int]
) -> None:
    """After kill -9 between parts another process sends the shard anew and ends what was begun."""
    (build / SHARD).write_bytes(random.Random(3).randbytes(9 * PART))
    key = f"models/glm/builds/abc/{SHARD}"
    url = f"http://{weed[0]}:{weed[1]}"
    env = {**os.environ, **KEYS, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    command = [sys.executable, "-c", UPLOAD, str(build), bucket, SHARD]
    process = subprocess.Popen(command, env=env)

    def begun() -> list[Any]:
        return client.list_multipart_uploads(Bucket=bucket).get("Uploads", [])

    while not begun():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(begun()) == 1
    target(client, bucket, tmp_path).upload(build, digest_of(build, SHARD))
    got = client.get_object(Bucket=bucket, Key=key)
    assert hashlib.sha256(got["Body"].read()).hexdigest() == digest_of(build, SHARD).sha256
    assert got["Metadata"]["sha256"] == digest_of(build, SHARD).sha256
    assert begun() == []


def test_each_part_carries_its_digest(
    client: Any, bucket: str, build: Path, tmp_path: Path, weed: tuple[str, int]
) -> None:
    """Server and client agree on each part's sha256, so that a flipped bit is refused."""
    watched, _ = recording(weed)
    algorithms = set[str]()
    watched.meta.events.register(
        "provide-client-params.s3.UploadPart",
        lambda params, **_: algorithms.add(params["ChecksumAlgorithm"]),
    )
    target(watched, bucket, tmp_path).upload(build, digest_of(build, SHARD))
    assert algorithms == {"SHA256"}
    head = client.head_object(
        Bucket=bucket, Key=f"models/glm/builds/abc/{SHARD}", ChecksumMode="ENABLED"
    )
    assert head["ChecksumSHA256"].endswith("-3")


def test_a_file_that_changed_becomes_no_object(
    client: Any, bucket: str, build: Path, tmp_path: Path, weed: Any
) -> None:
    """The whole file's digest is known before the last act, and nothing is made of its parts."""
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
        lost = {"UploadPart": 1, "CompleteMultipartUpload": 1, "PutObject": 3}

        def lose(http_response: Any, parsed: Any, model: Any, **_: Any) -> None:
            if lost.get(model.name, 0):
                lost[model.name] -= 1
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


def test_a_target_is_judged_by_a_byte_that_is_sent(
    client: Any, bucket: str, build: Path, tmp_path: Path, weed: Any
) -> None:
    """Who may write is not refused and leaves nothing behind; who may not is refused beforehand."""
    target(client, bucket, tmp_path).judge(build)
    assert keys(client, bucket) == set()
    assert not client.list_multipart_uploads(Bucket=bucket).get("Uploads")
    wrong = connect(f"http://{weed[0]}:{weed[1]}", "AnotherSecretOfTheTests", seconds=20)
    with pytest.raises(PublishError, match="Check the credentials"):
        target(wrong, bucket, tmp_path).judge(build)
    with pytest.raises(PublishError, match="404 NoSuchBucket"):
        target(client, "no-such-bucket", tmp_path).judge(build)


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
