"""One large object in parts: an upload that any later process goes on with.

boto3's own never resumes. Here each part's sha256 is sent with it (the server refuses other bytes)
and kept in a ledger; what the server still holds of those parts is not sent again.
"""

import hashlib
import logging
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from glm_quant.artifact import FileDigest, write_atomic
from glm_quant.errors import IntegrityError, PublishError
from glm_quant.hub.objects import Objects, base64_digest
from glm_quant.hub.retry import Patience, retry

_log = logging.getLogger(__name__)

# S3 takes at most 10,000 parts of at least 5 MiB.
PART_BYTES = 64 << 20
_MOST_PARTS = 10_000
_SENDERS = 4


class _Part(BaseModel):
    """A part as it was sent."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    number: int
    etag: str
    sha256: str


class _Ledger(BaseModel):
    """An upload in parts that was begun."""

    model_config = ConfigDict(extra="forbid")

    upload_id: str
    part_bytes: int
    parts: dict[int, _Part] = {}


class Multipart:
    """Uploads in parts to one bucket."""

    def __init__(
        self, objects: Objects, ledgers: Path, patience: Patience, part_bytes: int = PART_BYTES
    ) -> None:
        """Prepare.

        Args:
            objects: the bucket.
            ledgers: folder of ours for what is known of unfinished uploads.
            patience: how often to try a part.
            part_bytes: size of a part; at most four are in memory, and one waits.
        """
        self._objects = objects
        self._ledgers = ledgers
        self._patience = patience
        self._part_bytes = part_bytes

    def put(self, key: str, path: Path, file: FileDigest, condition: dict[str, str]) -> None:
        """Put a file that carries its sha256, sending only the parts that are not there yet.

        Raises:
            TransientError: it may work next time, with what is there by then.
            TakenError: the condition (IfMatch, IfNoneMatch) is not met.
            PublishError: the server refuses.
            IntegrityError: the file is not what was recorded; the upload is ended.
        """
        ledger = self._resume(key, file) or self._begin(key, file)
        whole = hashlib.sha256()
        with ThreadPoolExecutor(_SENDERS, thread_name_prefix="upload") as pool:
            sending = deque[Future[_Part]]()
            with path.open("rb") as reader:
                number = 0
                while data := reader.read(ledger.part_bytes):
                    number += 1
                    whole.update(data)
                    digest = hashlib.sha256(data).hexdigest()
                    if number in ledger.parts and ledger.parts[number].sha256 == digest:
                        continue
                    if len(sending) == _SENDERS:  # a part waits in memory
                        self._note(key, ledger, sending.popleft().result())
                    job = pool.submit(self._send, key, ledger.upload_id, number, data, digest)
                    sending.append(job)
            while sending:
                self._note(key, ledger, sending.popleft().result())
        if whole.hexdigest() != file.sha256:
            self._abort(key, ledger.upload_id)
            raise IntegrityError(
                f"{path}: the record says sha256 {file.sha256}, the file has {whole.hexdigest()}. "
                "The bytes changed after they were written; delete the file and run again."
            )
        parts = [ledger.parts[i] for i in range(1, number + 1)]
        with self._objects.translated(key):
            self._objects.client.complete_multipart_upload(
                Bucket=self._objects.bucket,
                Key=key,
                UploadId=ledger.upload_id,
                MultipartUpload={
                    "Parts": [
                        {
                            "PartNumber": part.number,
                            "ETag": part.etag,
                            "ChecksumSHA256": base64_digest(part.sha256),
                        }
                        for part in parts
                    ]
                },
                **condition,
            )
        self._ledger_path(key).unlink(missing_ok=True)

    def _begin(self, key: str, file: FileDigest) -> _Ledger:
        with self._objects.translated(key):
            answer = self._objects.client.create_multipart_upload(
                Bucket=self._objects.bucket,
                Key=key,
                Metadata={"sha256": file.sha256},
                ChecksumAlgorithm="SHA256",
            )
        size = max(self._part_bytes, -(-file.size_bytes // _MOST_PARTS))
        ledger = _Ledger(upload_id=str(answer["UploadId"]), part_bytes=size)
        self._save(key, ledger)
        return ledger

    def _resume(self, key: str, file: FileDigest) -> _Ledger | None:
        """Return what an earlier process began, with the parts that the server still holds.

        Uploads of this object that no ledger knows are ended: their parts would cost for ever.
        """
        try:
            ledger = _Ledger.model_validate_json(self._ledger_path(key).read_bytes())
        except (FileNotFoundError, ValidationError):
            ledger = None
        with self._objects.translated(key):
            answer = self._objects.client.list_multipart_uploads(
                Bucket=self._objects.bucket, Prefix=key
            )
        begun = [str(u["UploadId"]) for u in answer.get("Uploads", ()) if u["Key"] == key]
        for upload_id in begun:
            if ledger is None or upload_id != ledger.upload_id:
                self._abort(key, upload_id)
        if ledger is None or ledger.upload_id not in begun:
            return None
        held = self._held(key, ledger.upload_id)
        ledger.parts = {
            number: part
            for number, part in ledger.parts.items()
            if held.get(number) == (part.etag, _size(file, number, ledger.part_bytes))
        }
        _log.info("%s: %d parts are there already", key, len(ledger.parts))
        return ledger

    def _held(self, key: str, upload_id: str) -> dict[int, tuple[str, int]]:
        """Return ETag and size of the parts that the server holds."""
        with self._objects.translated(key):
            pages = self._objects.client.get_paginator("list_parts").paginate(
                Bucket=self._objects.bucket, Key=key, UploadId=upload_id
            )
            return {
                int(part["PartNumber"]): (str(part["ETag"]), int(part["Size"]))
                for page in pages
                for part in page.get("Parts", ())
            }

    def _send(self, key: str, upload_id: str, number: int, data: bytes, digest: str) -> _Part:
        def attempt() -> _Part:
            with self._objects.translated(key):
                answer = self._objects.client.upload_part(
                    Bucket=self._objects.bucket,
                    Key=key,
                    UploadId=upload_id,
                    PartNumber=number,
                    Body=data,
                    ChecksumSHA256=base64_digest(digest),
                )
            return _Part(number=number, etag=str(answer["ETag"]), sha256=digest)

        return retry(attempt, self._patience, f"part {number} of {key}", PublishError)

    def _abort(self, key: str, upload_id: str) -> None:
        with self._objects.translated(key), suppress(self._objects.client.exceptions.NoSuchUpload):
            self._objects.client.abort_multipart_upload(
                Bucket=self._objects.bucket, Key=key, UploadId=upload_id
            )
        self._ledger_path(key).unlink(missing_ok=True)

    def _note(self, key: str, ledger: _Ledger, part: _Part) -> None:
        ledger.parts[part.number] = part
        self._save(key, ledger)

    def _save(self, key: str, ledger: _Ledger) -> None:
        write_atomic(self._ledger_path(key), ledger.model_dump_json().encode())

    def _ledger_path(self, key: str) -> Path:
        name = hashlib.sha256(f"{self._objects.bucket}/{key}".encode()).hexdigest()[:16]
        return self._ledgers / f"{name}.parts.json"


def _size(file: FileDigest, number: int, part_bytes: int) -> int:
    return min(part_bytes, file.size_bytes - (number - 1) * part_bytes)
