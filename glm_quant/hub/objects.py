"""The objects of one S3 bucket; botocore's errors told apart: passing, absent, taken, final."""

import base64
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's own name for it
    HTTPClientError,
)
from pydantic import BaseModel, ValidationError

from glm_quant.errors import PublishError, SourceError
from glm_quant.hub.retry import TransientError
from glm_quant.hub.s3 import promised_sha256, translate


class AbsentError(Exception):
    """There is no such object; never leaves this package."""


class TakenError(Exception):
    """Somebody else wrote in between, so a condition was not met; never leaves this package."""


Model = TypeVar("Model", bound=BaseModel)


class Objects:
    """One bucket. Every method raises `TransientError` for what may pass, else `PublishError`."""

    def __init__(self, client: Any, bucket: str) -> None:
        """Attach a boto3 client to a bucket."""
        self.client = client
        self.bucket = bucket

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

    def keys(self, prefix: str, delimiter: str = "") -> list[str]:
        """Return the keys below a prefix; with a delimiter those directly below."""
        with self.translated(""):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix, Delimiter=delimiter
            )
            return [str(entry["Key"]) for page in pages for entry in page.get("Contents", ())]

    def dated(self, prefix: str) -> list[tuple[str, datetime]]:
        """Return the keys below a prefix, each with the time at which it was last written."""
        with self.translated(""):
            pages = self.client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=prefix
            )
            return [
                (str(entry["Key"]), entry["LastModified"])
                for page in pages
                for entry in page.get("Contents", ())
            ]

    def begun(self, prefix: str) -> list[tuple[str, datetime]]:
        """Return the keys of uploads in parts that are not ended, each with its beginning."""
        return [(str(upload["Key"]), upload["Initiated"]) for upload in self._uploads(prefix)]

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
        except ClientError as error:
            raise _meaning(error, where) from None
        except (ConnectionError, HTTPClientError) as error:
            raise TransientError(type(error).__name__) from None
        except BotoCoreError as error:
            raise PublishError(
                f"{where}: {error}. Set credentials, region and endpoint as for the AWS command "
                "line (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL or a profile)."
            ) from None


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
