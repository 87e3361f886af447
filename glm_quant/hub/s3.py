"""A checkpoint under a prefix of an S3 bucket, or of anything that speaks S3.

Each range is asked with If-Match, so all bytes are of the version that was listed. An ETag is no
digest of the content, and boto3 checks no range: a sha256 is promised only where the object carries
one, as metadata `sha256` (which this project sets when it uploads) or as a full-object checksum.
Credentials, region and endpoint follow boto3's own rules (AWS_ENDPOINT_URL among them).
"""

import base64
import json
import re
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's own name for it
    HTTPClientError,
    IncompleteReadError,
    ResponseStreamingError,
)

from glm_quant.checkpoint.source import SourceFile
from glm_quant.errors import SourceError
from glm_quant.hub.remote import RemoteSource
from glm_quant.hub.retry import Patience, TransientError, asked_wait, connection_failure, retry
from glm_quant.hub.window import DEFAULT_WINDOW

# What was received of a piece before a cut is lost.
_PIECE_BYTES = 128 << 10
_RETRIED = {400, 408, 425, 429}  # 400 is RequestTimeout; other 400s are told apart by their code
_PASSING_CODES = {
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "InternalError",
    "RequestTimeTooSkewed",
}
_LISTERS = 8

# Names the build that a prefix shows, where glm-quant published to it.
LATEST = "LATEST"


class S3Source(RemoteSource):
    """A prefix of a bucket."""

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        cache: Path | None = None,
        window: int = DEFAULT_WINDOW,
        *,
        client: Any = None,
        patience: Patience | None = None,
    ) -> None:
        """List the objects.

        Args:
            bucket: its name.
            prefix: the folder in it.
            cache: see `RemoteSource`.
            window: see `RemoteSource`.
            client: a boto3 S3 client; default: one with time limits, by boto3's own rules.
            patience: how often to try.

        Raises:
            SourceError: no such bucket, nothing there, no access, or it cannot be reached.
        """
        patience = patience or Patience()
        place = S3Place(client or s3_client(), bucket, prefix, patience)
        super().__init__(place, cache, window, patience)


class S3Place:
    """The objects of a prefix as they were when listed."""

    def __init__(self, client: Any, bucket: str, prefix: str, patience: Patience) -> None:
        """List the objects and ask each for its sha256."""
        self._client = client
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        listed = retry(self._list, patience, self.uri)
        if LATEST in listed and "config.json" not in listed:
            self._prefix += f"{retry(self._build_named, patience, self.uri)}/"
            listed = retry(self._list, patience, self.uri)
        if not listed:
            raise SourceError(f"{self.uri}: there is nothing. Check bucket and prefix.")
        with ThreadPoolExecutor(_LISTERS, thread_name_prefix="head") as pool:
            found = pool.map(
                lambda name: retry(lambda: self._head(name), patience, f"{self.uri}/{name}"), listed
            )
            described = list(found)
        self._files = {file.name: file for file, _ in described}
        self._etags = {file.name: etag for file, etag in described}

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    @property
    def files(self) -> Mapping[str, SourceFile]:
        """The objects directly under the prefix by name."""
        return self._files

    @contextmanager
    def open_at(self, name: str, begin: int, end: int) -> Generator[Iterator[bytes]]:
        """Open bytes `begin` to `end` of an object."""
        size = self._files[name].size_bytes
        with self._translated(name):
            answer = self._client.get_object(
                Bucket=self._bucket,
                Key=self._prefix + name,
                Range=f"bytes={begin}-{end - 1}",
                IfMatch=self._etags[name],
            )
            body = answer["Body"]
            try:
                said, right = answer.get("ContentRange"), f"bytes {begin}-{end - 1}/{size}"
                if said is None and answer["ContentLength"] == size:
                    yield _clip(body.iter_chunks(_PIECE_BYTES), begin, end)
                elif said != right:
                    raise TransientError(f"the server announces {said}, it should be {right}")
                else:
                    yield body.iter_chunks(_PIECE_BYTES)
            finally:
                body.close()

    def _list(self) -> list[str]:
        names: list[str] = []
        with self._translated(""):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self._bucket, Prefix=self._prefix, Delimiter="/"
            )
            for page in pages:
                names += [entry["Key"][len(self._prefix) :] for entry in page.get("Contents", ())]
        return [name for name in names if name and "\\" not in name and not name.startswith(".")]

    def _build_named(self) -> str:
        """Return the folder of the build that LATEST names."""
        with self._translated(LATEST):
            answer = self._client.get_object(Bucket=self._bucket, Key=self._prefix + LATEST)
            data = answer["Body"].read()
        try:
            folder = str(json.loads(data)["prefix"])
        except (ValueError, KeyError, TypeError):
            folder = ""
        if not re.fullmatch(r"builds/[\w-]+", folder):
            raise SourceError(
                f"{self.uri}/{LATEST}: it names no build of glm-quant. Give the prefix that holds "
                "config.json."
            )
        return folder

    def _head(self, name: str) -> tuple[SourceFile, str]:
        with self._translated(name):
            answer = self._client.head_object(
                Bucket=self._bucket, Key=self._prefix + name, ChecksumMode="ENABLED"
            )
        size, etag = int(answer["ContentLength"]), str(answer["ETag"])
        digest = promised_sha256(answer)
        identity = f"sha256:{digest}" if digest else f"etag:{etag.strip(chr(34))}:{size}"
        return SourceFile(name, size, identity, digest), etag

    @contextmanager
    def _translated(self, name: str) -> Generator[None]:
        """Turn what botocore raises into what may pass and what will not."""
        where = f"{self.uri}/{name}" if name else self.uri
        try:
            yield
        except ClientError as error:
            raise translate(error, where) from None
        except (
            ConnectionError,
            HTTPClientError,
            IncompleteReadError,
            ResponseStreamingError,
        ) as error:
            raise connection_failure(host_of(self._client), error) from None
        except BotoCoreError as error:
            raise SourceError(
                f"{where}: {error}. Set credentials, region and endpoint as for the AWS command "
                "line (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL or a profile)."
            ) from None


def s3_client(attempts: int = 1) -> Any:
    """Return a client with time limits.

    Args:
        attempts: how often botocore tries a request itself. Trying again is ours, so that it is
            told; only parts of a large file, which boto3 sends on its own, are left to it.
    """
    config = Config(
        connect_timeout=10,
        read_timeout=30,
        retries={"total_max_attempts": attempts, "mode": "standard"},
        max_pool_connections=16,
    )
    return boto3.session.Session().client("s3", config=config)


def host_of(client: Any) -> str:
    """Return the host that a client asks, for messages."""
    return str(urlsplit(client.meta.endpoint_url).hostname)


def parse_s3_uri(uri: str) -> tuple[str, str]:
    """Return bucket and prefix of `s3://bucket[/prefix]`.

    Raises:
        SourceError: it is no such URI.
    """
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    if not re.fullmatch(r"[\w.-]{3,255}", bucket):
        raise SourceError(f"{uri}: write s3://bucket or s3://bucket/prefix.")
    return bucket, prefix


def translate(error: ClientError, where: str) -> Exception:
    """Return what an error of boto3 means: a `TransientError` if it may pass, else what to do."""
    answer: Any = error.response
    code = str(answer.get("Error", {}).get("Code", ""))
    meta = answer.get("ResponseMetadata", {})
    status = int(meta.get("HTTPStatusCode", 0))
    if status == 501:  # what it does not know today it does not know in an hour
        return SourceError(
            f"{where}: the server answered {status} {code}: it does not know something that is "
            "needed here, most likely checksums (SHA256) or uploads in parts. Use another server, "
            "or a newer version of it."
        )
    if code in _PASSING_CODES or status in _RETRIED - {400} or status >= 500:
        return TransientError(
            f"the server answered {status} {code}", asked_wait(meta.get("HTTPHeaders", {}))
        )
    if status == 412:
        return SourceError(
            f"{where}: the object was changed while it was read. Start the conversion again, when "
            "whoever writes there has finished."
        )
    if status in (401, 403):
        return SourceError(
            f"{where}: the server answered {status} {code}. Check the credentials and what they "
            "are allowed to read."
        )
    return SourceError(
        f"{where}: the server answered {status} {code}. Check bucket, prefix and endpoint."
    )


def promised_sha256(answer: Mapping[str, Any]) -> str | None:
    """Return the sha256 that an object carries, in metadata or as checksum of the whole object.

    The checksum of a multipart upload is one of its parts' checksums and ends in "-N".
    """
    said = str(answer.get("Metadata", {}).get("sha256", "")).lower()
    if re.fullmatch(r"[0-9a-f]{64}", said):
        return said
    checksum = str(answer.get("ChecksumSHA256", ""))
    if checksum and "-" not in checksum and answer.get("ChecksumType") != "COMPOSITE":
        return base64.b64decode(checksum).hex()
    return None


def _clip(pieces: Iterator[bytes], begin: int, end: int) -> Iterator[bytes]:
    """Yield the asked bytes of a server that ignored Range and sends the whole object."""
    position = 0
    for piece in pieces:
        first, last = max(0, begin - position), min(len(piece), end - position)
        position += len(piece)
        if first < last:
            yield piece[first:last]
        if position >= end:
            return
