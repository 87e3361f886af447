"""The objects of one S3 bucket; botocore's errors told apart: passing, absent, taken, final."""

import base64
import hashlib
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's own name for it
    HTTPClientError,
)
from pydantic import BaseModel, ValidationError

from glm_quant.artifact import FileDigest
from glm_quant.errors import IntegrityError, PublishError, SourceError
from glm_quant.hub.retry import TransientError, connection_failure
from glm_quant.hub.s3 import host_of, promised_sha256, translate

# S3 takes at most 10,000 parts of at least 5 MiB. Four requests, and ten parts in memory.
PART_BYTES = 16 << 20
_MOST_PARTS = 10_000
_REQUESTS = 4


class AbsentError(Exception):
    """There is no such object; never leaves this package."""


class TakenError(Exception):
    """Somebody else wrote in between, so a condition was not met; never leaves this package."""


Model = TypeVar("Model", bound=BaseModel)


class Objects:
    """One bucket. Every method raises `TransientError` for what may pass, else `PublishError`."""

    def __init__(self, client: Any, bucket: str, sender: Any = None) -> None:
        """Attach a boto3 client to a bucket; `sender` sends parts and tries each again itself."""
        self.client = client
        self.bucket = bucket
        self._sender = sender or client

    def get(self, key: str) -> tuple[bytes, str]:
        """Return the content of a small object and its ETag.

        Raises:
            AbsentError: there is none.
        """
        with self.translated(key):
            answer = self.client.get_object(Bucket=self.bucket, Key=key)
            return bytes(answer["Body"].read()), str(answer["ETag"])

    def find(self, key: str, model: type[Model]) -> tuple[Model | None, str]:
        """Return what a small JSON object of ours says, and its ETag; None and "" if there is none.

        Raises:
            PublishError: it says something else.
        """
        try:
            data, etag = self.get(key)
            return model.model_validate_json(data), etag
        except AbsentError:
            return None, ""
        except ValidationError:
            raise PublishError(
                f"s3://{self.bucket}/{key}: this is not of glm-quant. Choose another prefix."
            ) from None

    def put(
        self, key: str, data: bytes, sha256: str, condition: dict[str, str], **kind: str
    ) -> str:
        """Put a small object that carries its sha256; the server refuses other bytes.

        Returns:
            Its new ETag.

        Raises:
            TakenError: the condition (IfMatch, IfNoneMatch) is not met.
        """
        with self.translated(key):
            answer = self.client.put_object(
                Bucket=self.bucket,
                Key=key,
                Body=data,
                Metadata={"sha256": sha256},
                ChecksumSHA256=base64_digest(sha256),
                **condition,
                **kind,
            )
        return str(answer["ETag"])

    def put_file(self, key: str, folder: Path, file: FileDigest, part_bytes: int) -> None:
        """Put a large file in parts; each part's sha256 goes with it and the server refuses others.

        An upload that was cut off begins anew; what it left is ended first, since its parts would
        be paid for until somebody does.

        Raises:
            IntegrityError: the file is not what was recorded; no object is made of it.
        """
        self.abort(key)
        config = TransferConfig(
            multipart_threshold=part_bytes,
            multipart_chunksize=max(part_bytes, -(-file.size_bytes // _MOST_PARTS)),
            max_concurrency=_REQUESTS,
        )
        kind = {"Metadata": {"sha256": file.sha256}, "ChecksumAlgorithm": "SHA256"}
        with (
            self.translated(key),
            (folder / file.path).open("rb") as opened,
        ):
            stream = _CheckedStream(opened, folder / file.path, file.sha256)
            self._sender.upload_fileobj(stream, self.bucket, key, ExtraArgs=kind, Config=config)

    def try_writing(self, key: str) -> None:
        """Begin an upload in parts, send a part of one byte, and end it: no object comes of it.

        Raises:
            PublishError: we may not write there.
        """
        place = {"Bucket": self.bucket, "Key": key}
        digest = base64_digest(hashlib.sha256(b"x").hexdigest())
        with self.translated(key):
            begun = self.client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")
            place["UploadId"] = str(begun["UploadId"])
            try:
                self.client.upload_part(**place, PartNumber=1, Body=b"x", ChecksumSHA256=digest)
            finally:
                self.client.abort_multipart_upload(**place)

    def keys(self, prefix: str, delimiter: str = "") -> list[str]:
        """Return the keys below a prefix; with a delimiter those directly below."""
        with self.translated(""):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix, Delimiter=delimiter
            )
            return [str(entry["Key"]) for page in pages for entry in page.get("Contents", ())]

    def abort(self, prefix: str) -> None:
        """End the uploads in parts below a prefix, and so delete their parts."""
        for upload in self._uploads(prefix):
            with self.translated(upload["Key"]):
                self.client.abort_multipart_upload(
                    Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
                )

    def _uploads(self, prefix: str) -> list[dict[str, Any]]:
        with self.translated(""):
            pages = self.client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self.bucket, Prefix=prefix
            )
            return [upload for page in pages for upload in page.get("Uploads", ())]

    def head(self, key: str) -> tuple[int, str | None, str] | None:
        """Return size, sha256 and ETag of an object."""
        try:
            with self.translated(key):
                answer = self.client.head_object(
                    Bucket=self.bucket, Key=key, ChecksumMode="ENABLED"
                )
        except AbsentError:
            return None
        return int(answer["ContentLength"]), promised_sha256(answer), str(answer["ETag"])

    def age_seconds(self, key: str) -> float:
        """Return how long ago an object was written, by the server's own clock.

        Raises:
            AbsentError: there is none.
        """
        with self.translated(key):
            answer = self.client.head_object(Bucket=self.bucket, Key=key)
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        return (now - answer["LastModified"]).total_seconds()

    def delete(self, keys: Sequence[str]) -> None:
        """Delete objects; one that is gone already is no error."""
        for key in keys:
            with self.translated(key):
                self.client.delete_object(Bucket=self.bucket, Key=key)

    @contextmanager
    def translated(self, name: str) -> Generator[None]:
        """Turn what botocore raises into what may pass and what will not."""
        where = f"s3://{self.bucket}/{name}"
        try:
            yield
        except S3UploadFailedError as error:  # what boto3 makes of a ClientError of a transfer
            cause = error.__context__
            if not isinstance(cause, ClientError):
                raise
            raise _meaning(cause, where) from None
        except ClientError as error:
            raise _meaning(error, where) from None
        except (ConnectionError, HTTPClientError) as error:
            raise connection_failure(host_of(self.client), error) from None
        except BotoCoreError as error:
            raise PublishError(
                f"{where}: {error}. Set credentials, region and endpoint as for the AWS command "
                "line (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL or a profile)."
            ) from None


class _CheckedStream:
    """A file that boto3 reads once from its beginning, and that must end as was recorded."""

    def __init__(self, opened: BinaryIO, path: Path, sha256: str) -> None:
        self._opened, self._path, self._sha256 = opened, path, sha256
        self._digest = hashlib.sha256()

    def seekable(self) -> bool:
        """Say no, so that each byte is read once, in order."""
        return False

    def readable(self) -> bool:
        """Say yes: boto3 asks."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; at the end, before the upload is completed, check their digest.

        Raises:
            IntegrityError: they are not what was recorded.
        """
        data = self._opened.read(size)
        self._digest.update(data)
        if not data and self._digest.hexdigest() != self._sha256:
            raise IntegrityError(
                f"{self._path}: the record says sha256 {self._sha256}, the file has "
                f"{self._digest.hexdigest()}. The bytes changed after they were written; delete "
                "the file and run again."
            )
        return data


def base64_digest(digest: str) -> str:
    """Return a hex sha256 as S3's headers have it."""
    return base64.b64encode(bytes.fromhex(digest)).decode()


def _meaning(error: ClientError, where: str) -> Exception:
    answer: Any = error.response
    status = int(answer.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
    code = str(answer.get("Error", {}).get("Code", ""))
    if status == 404 and code in ("NoSuchKey", "404", "NotFound"):
        return AbsentError(where)
    if status == 412 or code == "ConditionalRequestConflict":
        return TakenError(where)
    if code == "NoSuchUpload":  # ended by somebody, or its reply was lost; begin by looking again
        return TransientError("the upload in parts is not there any more")
    found = translate(error, where)
    return PublishError(str(found)) if isinstance(found, SourceError) else found
