"""Publishing to a prefix of an S3 bucket, or of anything that speaks S3.

    PREFIX/builds/BUILD_ID/…   the files of a build; each carries its sha256 as metadata
    PREFIX/LATEST              JSON: which build people should read, and the sha256 of its files

`LATEST` is written last and on condition, so who follows it never sees half a build. An ETag is no
digest: what is there is judged by the sha256 that each object carries.

A build that is given up leaves its folder; deployments/README.md has the command that deletes it.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from glm_quant.artifact import FileDigest
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.checkpoint.source import Source, SourceFile
from glm_quant.errors import PublishError
from glm_quant.hub.objects import PART_BYTES, Objects, TakenError
from glm_quant.hub.retry import Patience, TransientError, retry
from glm_quant.hub.s3 import LATEST, S3Source, s3_client
from glm_quant.hub.target import SHARD_ENDING, Listing, Published, compare

_log = logging.getLogger(__name__)

T = TypeVar("T")


_NAME = r"^builds/[\w-]+$"
_PART_ATTEMPTS = 5


class Latest(BaseModel):
    """Which build people should read.

    Attributes:
        prefix: where its files are, relative to the target.
        manifest_sha256: of its manifest.
        files: all of it.
        replaces: the build that was named before, which may be deleted.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    format: int = 1
    prefix: str = Field(pattern=_NAME)
    manifest_sha256: str
    files: list[FileDigest]
    replaces: str | None = Field(default=None, pattern=_NAME)


class S3Target:
    """A prefix of a bucket."""

    def __init__(
        self,
        bucket: str,
        prefix: str,
        *,
        build_id: str,
        keep_previous: bool = False,
        client: Any = None,
        patience: Patience | None = None,
        part_bytes: int = PART_BYTES,
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            bucket: its name.
            prefix: the folder in it.
            build_id: names the folder of the build's files.
            keep_previous: leave earlier builds where they are.
            client: a boto3 S3 client; default: one with time limits, by boto3's own rules, and
                another that tries each part of a large file several times.
            patience: how often to try.
            part_bytes: size of a part of a large file.
        """
        sender = client or s3_client(attempts=_PART_ATTEMPTS)
        self._objects = Objects(client or s3_client(), bucket, sender)
        self._root = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._name = f"builds/{build_id}"
        self._build = f"{self._root}{self._name}/"
        self._keep_previous = keep_previous
        self._patience = patience or Patience()
        self._part_bytes = part_bytes

    @property
    def uri(self) -> str:
        """`s3://bucket/prefix`."""
        return f"s3://{self._objects.bucket}/{self._root}".rstrip("/")

    def visible(self) -> Listing:
        """Return the files of the build that LATEST names, as the bucket has them."""
        latest, _ = self._ask("read LATEST", self._latest)
        if latest is None:
            return Listing("", {})
        found: dict[str, SourceFile] = {}
        for file in latest.files:
            key = f"{self._root}{latest.prefix}/{file.path}"
            there = self._ask(f"look at {file.path}", lambda key=key: self._objects.head(key))
            if there is not None:
                size, digest, etag = there
                identity = f"sha256:{digest}" if digest else f"etag:{etag}"
                found[file.path] = SourceFile(file.path, size, identity, digest)
        return Listing(latest.prefix, found)

    def judge(self, folder: Path) -> None:  # noqa: ARG002 - what is here does not matter
        """Look for strangers, and send a byte of which no object is made."""
        self._ask("look for strangers", self._refuse_strangers)
        self._ask("try to write", lambda: self._objects.try_writing(f"{self._build}trial"))

    def upload(self, folder: Path, file: FileDigest) -> None:
        """Put one file into the build's folder, and compare the object's sha256 with ours."""
        where, patience = f"{self.uri}: upload {file.path}", self._patience.enduring()
        retry(lambda: self._upload(folder, file), patience, where, PublishError, is_transfer=True)

    def publish(self, folder: Path, files: Sequence[FileDigest]) -> Published:
        """Put what is missing, then let LATEST name the build, then delete earlier ones."""
        self._ask("look for strangers", self._refuse_strangers)
        diff = compare(folder, files, self.visible().files)
        for file in files:
            self.upload(folder, file)
        self._ask("delete leftovers", lambda: self._delete_strays(files))
        self._ask("write LATEST", lambda: self._point(files))
        if not self._keep_previous:
            self._ask("delete earlier builds", self._delete_earlier)
        return Published(self._name, f"{self.uri}/{self._name}", diff)

    def staged(self, cache: Path) -> Source:
        """Return the build's folder."""
        return S3Source(
            self._objects.bucket,
            self._build,
            cache,
            client=self._objects.client,
            patience=self._patience,
        )

    # One object

    def _upload(self, folder: Path, file: FileDigest) -> None:
        key, path = self._build + file.path, folder / file.path
        there = self._objects.head(key)
        if there is not None and there[:2] == (file.size_bytes, file.sha256):
            return
        if not self._copy_earlier(key, file):
            if not path.is_file():
                raise PublishError(
                    f"{path}: the shard is neither here nor at {self.uri}. Run the conversion "
                    "again: it makes what is missing."
                )
            condition = {"IfNoneMatch": "*"} if there is None else {"IfMatch": there[2]}
            with suppress(TakenError):  # somebody else put it meanwhile; its sha256 decides
                self._put(key, folder, file, condition)
        found = self._objects.head(key)
        if found is None or found[:2] != (file.size_bytes, file.sha256):
            raise PublishError(
                f"{self.uri}/{file.path}: should have {file.size_bytes:,} bytes with sha256 "
                f"{file.sha256}, the bucket has {found and found[:2]}. Somebody else writes there; "
                "run again when they have finished."
            )
        _log.info("%s: at %s", file.path, self.uri)

    def _put(self, key: str, folder: Path, file: FileDigest, condition: dict[str, str]) -> None:
        if file.size_bytes > self._part_bytes:
            # Without the condition, which boto3's transfer does not know: whoever else puts
            # this object puts the same bytes, and the digest is read back.
            self._objects.put_file(key, folder, file, self._part_bytes)
        else:
            file.check(folder)
            data = (folder / file.path).read_bytes()
            self._objects.put(key, data, file.sha256, condition)

    def _copy_earlier(self, key: str, file: FileDigest) -> bool:
        """Let the bucket copy a file that the visible build has too; whether it did."""
        latest, _ = self._latest()
        old = latest and next((f for f in latest.files if f.sha256 == file.sha256), None)
        if latest is None or old is None:
            return False
        source = f"{self._root}{latest.prefix}/{old.path}"
        there = self._objects.head(source)
        if source == key or there is None or there[:2] != (file.size_bytes, file.sha256):
            return False
        with self._objects.translated(key):
            self._objects.client.copy(
                {"Bucket": self._objects.bucket, "Key": source},
                self._objects.bucket,
                key,
                ExtraArgs={"Metadata": {"sha256": file.sha256}, "MetadataDirective": "REPLACE"},
            )
        return True

    # The whole

    def _latest(self) -> tuple[Latest | None, str]:
        """Return what LATEST says, and its ETag; None and nothing where there is none."""
        return self._objects.find(self._root + LATEST, Latest)

    def _point(self, files: Sequence[FileDigest]) -> None:
        """Let LATEST name this build, on top of what it says now."""
        before, etag = self._latest()
        replaces = before and (before.replaces if before.prefix == self._name else before.prefix)
        latest = Latest(
            prefix=self._name,
            manifest_sha256=next(file.sha256 for file in files if file.path == MANIFEST_NAME),
            files=sorted(files, key=lambda file: file.path),
            replaces=replaces,
        )
        if latest == before:
            return
        data = (json.dumps(latest.model_dump(), indent=1) + "\n").encode()
        condition = {"IfMatch": etag} if before else {"IfNoneMatch": "*"}
        try:
            self._objects.put(
                self._root + LATEST,
                data,
                hashlib.sha256(data).hexdigest(),
                condition,
                ContentType="application/json",
            )
        except TakenError:
            raise TransientError("somebody else wrote LATEST meanwhile") from None

    def _refuse_strangers(self) -> None:
        latest, _ = self._latest()
        if latest is None:
            weights = [
                key for key in self._objects.keys(self._root, "/") if key.endswith(SHARD_ENDING)
            ]
            if weights:
                raise PublishError(
                    f"{self.uri}: it holds a model that is no build of glm-quant ({weights[0]}, "
                    f"no {LATEST}). Choose another prefix."
                )

    def _delete_strays(self, files: Sequence[FileDigest]) -> None:
        wanted = {self._build + file.path for file in files}
        self._objects.delete([k for k in self._objects.keys(self._build) if k not in wanted])

    def _delete_earlier(self) -> None:
        """Delete the build that this one replaced; others may just be on their way."""
        latest, _ = self._latest()
        if latest is not None and latest.prefix == self._name and latest.replaces:
            self._objects.delete(self._objects.keys(f"{self._root}{latest.replaces}/"))

    def _ask(self, what: str, action: Callable[[], T]) -> T:
        return retry(action, self._patience, f"{self.uri}: {what}", PublishError)
