"""A build's records in S3, so that a machine with an empty workspace takes the build over.

    PREFIX/lease.json   which machine works on the build; written again and again while it does
    PREFIX/records/…    the workspace's records, but for those that speak of one machine's disk

What a record tells of is at a target or is made again, the same bytes wherever it is made. So the
lease saves work, it does not keep anything whole: who finds a fresh one refuses, who finds one that
was not renewed for `lease_seconds` takes it, and who has lost it stops. Ages are those of the
server's own clock. A thread copies and renews, so that a slow network holds nothing up: a process
that is killed leaves out what it recorded in its last seconds.
"""

import hashlib
import logging
import os
import re
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self, TypeVar

from pydantic import BaseModel, ConfigDict

from glm_quant.artifact import write_atomic
from glm_quant.errors import BusyError, GlmQuantError, PublishError
from glm_quant.hub.objects import AbsentError, Objects, TakenError
from glm_quant.hub.retry import Patience, retry
from glm_quant.hub.s3 import parse_s3_uri, s3_client
from glm_quant.litter import files_below
from glm_quant.workspace import Workspace

_log = logging.getLogger(__name__)

T = TypeVar("T")

_LEASE = "lease.json"
_SECONDS_BETWEEN_COPIES = 5.0
_RENEWALS = 4  # in the time of one lease: three may fail
# Keys are data: nothing else becomes a path.
_RECORD = re.compile(r"(?:[\w-][\w.-]*/)*[\w-][\w.-]*\.json")
# Why this machine's last run stopped, and which files its disk has or has let go.
_OF_ONE_DISK = re.compile(r"failure\.json|restored/.*|shards/.*\.elsewhere\.json")


class Lease(BaseModel):
    """Who works on a build.

    Attributes:
        machine: its host name.
        workspace: the folder there; who holds its lock is the only one in it.
        process: number of the process, for a person.
        renewals: grows, so that no two versions of the object are alike.
        over: whether the holder has ended in order.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    machine: str
    workspace: str
    process: int
    renewals: int = 0
    over: bool = False


class SharedRecords:
    """A workspace's records at an S3 prefix, and the lease on them; a context manager.

    The workspace's own lock is held outside of the block.
    """

    def __init__(
        self,
        uri: str,
        workspace: Workspace,
        lease_seconds: float,
        *,
        client: Any = None,
        patience: Patience | None = None,
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            uri: `s3://bucket/prefix`, one a build.
            workspace: of the build.
            lease_seconds: after so long without a sign of life another machine may take over.
            client: a boto3 S3 client; default: one with time limits, by boto3's own rules.
            patience: how often to try at the beginning.

        Raises:
            SourceError: the URI is malformed.
        """
        bucket, prefix = parse_s3_uri(uri)
        self._objects = Objects(client or s3_client(), bucket)
        self._root = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self._uri = uri
        self._folder = workspace.records
        self._patience = patience or Patience()
        self._lease_seconds = lease_seconds
        self._lease = Lease(
            machine=socket.gethostname(), workspace=str(workspace.root), process=os.getpid()
        )
        self._etag = ""
        self._was_ours: bool | None = None  # whether this workspace was the last to hold the lease
        self._taken_by: str | None = None
        self._failing = False
        self._there: dict[str, str] = {}  # sha256 of each record as it stands in the bucket
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="records", daemon=True)

    def __enter__(self) -> Self:
        """Take the lease, fetch what another machine recorded, begin to copy.

        Raises:
            BusyError: another machine works on the build.
            PublishError: the bucket cannot be reached, or refuses.
        """
        self._ask("take the lease", self._take)
        self._ask("fetch the records", self._pull)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Copy what is left and give the lease back; what fails then is only told."""
        self._closing.set()
        self._thread.join()
        if self._taken_by is None:
            self._told(self._push)
            self._told(lambda: self._renew(over=True))

    def require_held(self) -> None:
        """Check that this process may go on.

        Raises:
            BusyError: another machine has taken the build over.
        """
        if self._taken_by is not None:
            raise BusyError(
                f"{self._uri}: {self._taken_by} has taken this build over, since this machine gave "
                f"no sign of life for {self._lease_seconds:.0f} s. Let it finish, or stop it and "
                "run again here."
            )

    # The lease

    def _take(self) -> None:
        found, self._etag = self._found()
        ours = found is not None and (found.machine, found.workspace) == (
            self._lease.machine,
            self._lease.workspace,
        )
        if self._was_ours is None:  # else the answer to our own write was lost
            self._was_ours = ours
        if found is not None and not ours and not found.over:
            self._require_silent(found)
        self._lease = self._lease.model_copy(update={"renewals": found.renewals if found else 0})
        try:
            self._write(
                over=False, condition={"IfMatch": self._etag} if found else {"IfNoneMatch": "*"}
            )
        except TakenError:
            raise self._busy("another machine", 0.0) from None
        if found is not None and not ours:
            _log.info("%s: this build was begun by %s and goes on here", self._uri, found.machine)

    def _require_silent(self, found: Lease) -> None:
        age = self._objects.age_seconds(self._root + _LEASE)
        if age < self._lease_seconds:
            raise self._busy(f"process {found.process} of {found.machine}", age)

    def _busy(self, who: str, age: float) -> BusyError:
        return BusyError(
            f"{self._uri}: {who} works on this build and was heard of {age:.0f} s ago. Wait for "
            f"it or stop it; when nothing was heard of it for {self._lease_seconds:.0f} s, the "
            "same command takes over."
        )

    def _found(self) -> tuple[Lease | None, str]:
        return self._objects.find(self._root + _LEASE, Lease)

    def _renew(self, over: bool = False) -> None:
        """Write the lease again; or note who has it now."""
        try:
            self._write(over, {"IfMatch": self._etag})
        except (TakenError, AbsentError):
            found, etag = self._found()
            if found == self._lease:  # our own write, whose answer was lost
                self._etag = etag
                return
            self._taken_by = found.machine if found else "somebody"
            _log.warning("%s: %s has taken this build over", self._uri, self._taken_by)

    def _write(self, over: bool, condition: dict[str, str]) -> None:
        update = {"over": over, "renewals": self._lease.renewals + 1}
        self._lease = self._lease.model_copy(update=update)
        data = self._lease.model_dump_json(indent=2).encode()
        key = self._root + _LEASE
        self._etag = self._objects.put(key, data, hashlib.sha256(data).hexdigest(), condition)

    # The records

    def _pull(self) -> None:
        """Fetch records; where this workspace was the last to work its own are newer."""
        root = f"{self._root}records/"
        for key in self._objects.keys(root):
            name = key.removeprefix(root)
            if not is_shared(name):
                continue
            data, _ = self._objects.get(key)
            self._there[name] = hashlib.sha256(data).hexdigest()
            path = self._folder / name
            if not (self._was_ours and path.exists()):
                write_atomic(path, data)

    def _push(self) -> None:
        """Copy what is new or another than before, and delete what is gone here."""
        here = {
            path.relative_to(self._folder).as_posix(): path
            for path in files_below(self._folder, "*.json")
        }
        shared = {name: path for name, path in here.items() if is_shared(name)}
        for name, path in shared.items():
            try:
                data = path.read_bytes()
            except FileNotFoundError:  # deleted in this moment
                continue
            digest = hashlib.sha256(data).hexdigest()
            if self._there.get(name) != digest:
                self._objects.put(f"{self._root}records/{name}", data, digest, {})
                self._there[name] = digest
        for name in sorted(self._there.keys() - shared.keys()):
            self._objects.delete([f"{self._root}records/{name}"])
            del self._there[name]

    def _work(self) -> None:
        pause = min(_SECONDS_BETWEEN_COPIES, self._lease_seconds / _RENEWALS)
        renewed = time.monotonic()
        while not self._closing.wait(pause) and self._taken_by is None:
            self._told(self._push)
            if time.monotonic() - renewed >= self._lease_seconds / _RENEWALS:
                self._told(self._renew)
                renewed = time.monotonic()

    def _told(self, action: Callable[[], None]) -> None:
        """Do something that the next time does again if it fails."""
        try:
            action()
        except Exception as error:  # nothing of this may end the thread
            if not self._failing:
                _log.warning("%s: the records are not copied for now: %s", self._uri, error)
            self._failing = True
        else:
            self._failing = False

    def _ask(self, what: str, action: Callable[[], T]) -> T:
        try:
            return retry(action, self._patience, f"{self._uri}: {what}", PublishError)
        except GlmQuantError:
            raise
        except AbsentError:
            raise PublishError(
                f"{self._uri}: {what}: an object went away meanwhile. Run again."
            ) from None


def is_shared(name: str) -> bool:
    """Whether a file of this name in `records/` is for other machines too."""
    return bool(_RECORD.fullmatch(name)) and not _OF_ONE_DISK.fullmatch(name)
