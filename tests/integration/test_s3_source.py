"""S3 as a source: boto3 against SeaweedFS, a server that refuses what AWS refuses."""

import hashlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from glm_quant.data import tiny_glm_path
from glm_quant.errors import SourceError
from glm_quant.hub.retry import Patience
from glm_quant.hub.s3 import S3Source, parse_s3_uri
from tests.hub_server.proxy import Proxy, Spoil
from tests.plain import PLAIN
from tests.s3_server import KEYS, connect

QUICK = Patience(tries=5, first_seconds=0.01, longest_seconds=0.05)
SHARD = "model.safetensors"
SIZE = 3_000_000
DATA = random.Random(4).randbytes(SIZE)
DIGEST = hashlib.sha256(DATA).hexdigest()
CONVERT = [str(Path(sys.executable).with_name("glm-quant")), "convert"]


@pytest.fixture
def proxy(weed: tuple[str, int]) -> Generator[Proxy]:
    with Proxy(weed) as running:
        yield running


@pytest.fixture(scope="module")
def bucket(weed: tuple[str, int]) -> str:
    """Give a bucket with one shard three times: promised in metadata, by checksum, not at all."""
    client = connect(f"http://{weed[0]}:{weed[1]}", seconds=20)
    client.create_bucket(Bucket="models")
    shard = {"Bucket": "models", "Body": DATA}
    client.put_object(**shard, Key=f"told/{SHARD}", Metadata={"sha256": DIGEST})
    client.put_object(**shard, Key=f"summed/{SHARD}", ChecksumAlgorithm="SHA256")
    client.put_object(**shard, Key=f"plain/{SHARD}")
    client.put_object(Bucket="models", Key="plain/deeper/other.safetensors", Body=b"x")
    client.put_object(Bucket="models", Key="plain/config.json", Body=b"{}")
    return "models"


def open_s3(proxy: Proxy, bucket: str, prefix: str, cache: Path | None = None) -> S3Source:
    return S3Source(bucket, prefix, cache, client=connect(proxy.url), patience=QUICK)


def test_files_carry_what_the_objects_promise(proxy: Proxy, bucket: str) -> None:
    """A sha256 from metadata or checksum, else ETag and size; folders below are not listed."""
    for prefix in ("told", "summed"):
        file = open_s3(proxy, bucket, prefix).files()[SHARD]
        assert (file.size_bytes, file.sha256, file.identity) == (SIZE, DIGEST, f"sha256:{DIGEST}")
    plain = open_s3(proxy, bucket, "plain/")
    assert sorted(plain.files()) == ["config.json", SHARD]
    assert plain.files()[SHARD].sha256 is None
    assert plain.files()[SHARD].identity.startswith("etag:")
    assert plain.uri == "s3://models/plain"


def answer(status: str, body: bytes, **headers: object) -> Spoil:
    """One answer that is not the server's own."""
    head = {"Content-Length": len(body), **{k.replace("_", "-"): v for k, v in headers.items()}}
    lines = [f"HTTP/1.1 {status}", *(f"{key}: {value}" for key, value in head.items()), "", ""]
    return Spoil("answer", answer="\r\n".join(lines).encode() + body)


def refusal(status: str, code: str, **headers: object) -> Spoil:
    """An error as S3 words it."""
    body = f"<Error><Code>{code}</Code><Message>on order</Message></Error>".encode()
    return answer(status, body, Content_Type="application/xml", **headers)


WHOLE = f"bytes 0-{SIZE - 1}/{SIZE}"

SPOILS: dict[str, list[Spoil]] = {
    "nothing": [],
    "dropped": [Spoil("drop", 1_000_000, times=3)],
    "reset": [Spoil("reset", 700_000, times=3)],
    "stalled": [Spoil("stall", 1_500_000)],
    "corrupt": [Spoil("corrupt", 2_000_000)],
    "503 SlowDown": [refusal("503 Slow Down", "SlowDown")] * 3,
    "500": [refusal("500 Internal Server Error", "InternalError")],
    "429 and Retry-After": [refusal("429 Too Many Requests", "Throttling", Retry_After=1)],
    "400 RequestTimeout": [refusal("400 Bad Request", "RequestTimeout")],
    "short": [answer("206 Partial Content", DATA[:-9], Content_Range=WHOLE)],
    "long": [answer("206 Partial Content", DATA + b"x" * 9, Content_Range=WHOLE)],
    "another range": [
        answer("206 Partial Content", DATA[9:], Content_Range="bytes 9-2999999/3000000")
    ],
    "ignored range": [Spoil("drop", 1_000_000), answer("200 OK", DATA)],
    "everything": [Spoil("reset", 1), Spoil("corrupt", 500_000), Spoil("drop", 1_000_000)],
}


@pytest.mark.parametrize("name", SPOILS)
def test_every_fault_ends_in_the_right_bytes(
    proxy: Proxy, bucket: str, tmp_path: Path, name: str
) -> None:
    """Where there is a promise, a flipped bit is caught too."""
    source = open_s3(proxy, bucket, "told", tmp_path)
    proxy.order(*SPOILS[name])
    begin = time.monotonic()
    assert source.acquire(SHARD).read_bytes() == DATA
    assert proxy.is_done, "not everything that was ordered came to pass"
    if name.startswith("429"):
        assert time.monotonic() - begin >= 1, "it did not wait as long as it was asked to"
    source.release(SHARD)
    assert list(tmp_path.iterdir()) == []


def test_keys_that_expire_halfway(proxy: Proxy, bucket: str, tmp_path: Path) -> None:
    """403 ends the run with the way out; what was fetched stays, and new keys go on from there."""
    proxy.order(Spoil("drop", 2_000_000), refusal("403 Forbidden", "ExpiredToken"))
    with pytest.raises(SourceError, match=r"403 ExpiredToken\. Check the credentials"):
        open_s3(proxy, bucket, "told", tmp_path).acquire(SHARD)
    (part,) = tmp_path.glob("*.part")
    assert part.stat().st_size > 1_000_000
    assert open_s3(proxy, bucket, "told", tmp_path).acquire(SHARD).read_bytes() == DATA


@pytest.mark.parametrize("prefix", ["told", "plain"])
def test_another_process_goes_on(
    proxy: Proxy, bucket: str, tmp_path: Path, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part is continued, with a promise from its end, without one from its last mark."""
    monkeypatch.setattr("glm_quant.hub.fetch._MARK_BYTES", 300_000)
    impatient = S3Source(
        bucket, prefix, tmp_path, client=connect(proxy.url), patience=Patience(tries=1)
    )
    proxy.order(Spoil("drop", 2_000_000))
    with pytest.raises(SourceError, match="tries in a row"):
        impatient.acquire(SHARD)
    (part,) = tmp_path.glob("*.part")
    assert 1_500_000 < part.stat().st_size < 2_000_000
    asked: list[str] = []
    client = connect(proxy.url)
    client.meta.events.register(
        "before-call.s3.GetObject", lambda params, **_: asked.append(params["headers"]["Range"])
    )
    source = S3Source(bucket, prefix, tmp_path, client=client, patience=QUICK)
    size = part.stat().st_size
    assert source.acquire(SHARD).read_bytes() == DATA
    begin = int(asked[0].removeprefix("bytes=").partition("-")[0])
    assert begin == size if prefix == "told" else size - 600_000 < begin <= size


def test_ranges_and_small_files(proxy: Proxy, bucket: str) -> None:
    """Headers are read by range."""
    source = open_s3(proxy, bucket, "plain")
    assert source.read(SHARD, 0, 8) == DATA[:8]
    assert source.read(SHARD, 8, 5_000) == DATA[8:5_000]
    assert source.read(SHARD, 2_999_990) == DATA[-10:]
    assert source.read("config.json") == b"{}"


def test_an_object_that_changes_is_noticed(proxy: Proxy, bucket: str, weed: Any) -> None:
    """If-Match: bytes of two versions never meet."""
    writer = connect(f"http://{weed[0]}:{weed[1]}")
    writer.put_object(Bucket=bucket, Key="moving/a.safetensors", Body=b"first")
    source = open_s3(proxy, bucket, "moving")
    writer.put_object(Bucket=bucket, Key="moving/a.safetensors", Body=b"other")
    with pytest.raises(SourceError, match="was changed while it was read"):
        source.read("a.safetensors")


@pytest.mark.parametrize(
    ("bucket_name", "prefix", "secret", "said"),
    [
        ("models", "nothing-here", KEYS["AWS_SECRET_ACCESS_KEY"], "there is nothing"),
        ("no-such-bucket", "", KEYS["AWS_SECRET_ACCESS_KEY"], "404 NoSuchBucket"),
        ("models", "told", "AnotherSecretOfTheTests", "Check the credentials"),
    ],
)
def test_what_cannot_be_opened_is_named(
    proxy: Proxy, bucket: str, bucket_name: str, prefix: str, secret: str, said: str
) -> None:
    """Each with its way out, at once, without the secret."""
    with pytest.raises(SourceError, match=said) as caught:
        S3Source(bucket_name, prefix, client=connect(proxy.url, secret), patience=QUICK)
    assert secret not in str(caught.value)


def test_a_server_that_is_not_there_is_given_up(tmp_path: Path) -> None:
    """Bounded, with the number of tries."""
    with pytest.raises(SourceError, match="5 tries in a row failed"):
        S3Source("models", client=connect("http://127.0.0.1:1"), patience=QUICK)


def test_the_command_line_reads_from_s3(weed: tuple[str, int], tmp_path: Path) -> None:
    """Same bytes as from the folder; credentials by boto3's own rules; no secret in any file."""
    url = f"http://{weed[0]}:{weed[1]}"
    client = connect(url, seconds=20)
    client.create_bucket(Bucket="conversion")
    for path in tiny_glm_path().iterdir():
        client.upload_file(str(path), "conversion", f"tiny/{path.name}")
    env = {**os.environ, **KEYS, "AWS_ENDPOINT_URL": url, "AWS_DEFAULT_REGION": "us-east-1"}
    for name, source in {"folder": str(tiny_glm_path()), "s3": "s3://conversion/tiny"}.items():
        command = [*CONVERT, "--source", source, "--recipe", PLAIN, "--output"]
        command += [str(tmp_path / name), "--window", "2"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    for path in (tmp_path / "folder").iterdir():
        if path.name != "manifest.json":
            assert (tmp_path / "s3" / path.name).read_bytes() == path.read_bytes(), path.name
    manifest = json.loads((tmp_path / "s3" / "manifest.json").read_bytes())
    assert manifest["source"] == "s3://conversion/tiny"
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert KEYS["AWS_SECRET_ACCESS_KEY"].encode() not in path.read_bytes()


@pytest.mark.parametrize("uri", ["s3://", "s3://a", "s3://a b/c", "s3:///prefix"])
def test_an_uri_that_is_none_is_refused(uri: str) -> None:
    """With the form that is meant."""
    with pytest.raises(SourceError, match="s3://bucket/prefix"):
        parse_s3_uri(uri)
