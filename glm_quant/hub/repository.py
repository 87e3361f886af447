"""Publishing to a repository on the Hub.

Shards are committed one by one to a work branch while the conversion goes on. One last commit on
the visible branch copies them from there (the Hub copies large files by their sha256, so no byte
moves and no local file is needed), adds the small files and deletes stale ones: nobody sees half a
build.

What a reader would get wrong: `create_commit` is not retried by huggingface_hub, has no time limit,
and a commit whose reply was lost did happen. So each try looks first at what is there.

A build that is given up leaves its work branch; deployments/README.md has the command that deletes
it.
"""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    ModelInfo,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import get_token

from glm_quant.artifact import FileDigest
from glm_quant.checkpoint.source import Source, SourceFile
from glm_quant.errors import IntegrityError, PublishError, SourceError
from glm_quant.hub.huggingface import HubSource, hub_client, limit_time, origin
from glm_quant.hub.permission import require_namespace, require_writing_token
from glm_quant.hub.retry import Patience, TransientError, asked_wait, connection_failure, retry
from glm_quant.hub.target import (
    SHARD_ENDING,
    Diff,
    Listing,
    Published,
    compare,
    is_same,
    refuse_strangers,
)

_log = logging.getLogger(__name__)

T = TypeVar("T")

_PASSING = {408, 425, 429}
# Somebody else committed in between; the next try reads again.
_MOVED = {409, 412}


class HubTarget:
    """One branch of a repository."""

    def __init__(
        self,
        repo: str,
        branch: str = "main",
        *,
        build_id: str,
        private: bool = False,
        endpoint: str | None = None,
        token: str | None = None,
        patience: Patience | None = None,
    ) -> None:
        """Prepare; nothing is asked yet.

        Args:
            repo: "org/name"; created by the first upload.
            branch: where the build becomes visible.
            build_id: names the work branch, so that two builds never meet on one.
            private: create the repository for its owner's eyes only.
            endpoint: default: HF_ENDPOINT, else huggingface.co.
            token: default: HF_TOKEN, else what `hf auth login` stored.
            patience: how often to try.
        """
        limit_time()
        self._api = hub_client(endpoint, token)
        self._repo, self._branch, self._private = repo, branch, private
        self._work = f"glm-quant-{build_id}"
        self._patience = patience or Patience()
        self._prepared = False

    @property
    def uri(self) -> str:
        """`hf://org/name@branch`."""
        return f"hf://{self._repo}@{self._branch}"

    def visible(self) -> Listing:
        """Return the branch's commit and files; nothing where there is no repository yet."""
        return self._ask("list the files", lambda: self._listing(self._branch))

    def judge(self, folder: Path) -> None:  # noqa: ARG002 - what is here does not matter
        """Ask who we are, look for strangers, and ask as a commit does whether we may write."""
        self._ask("ask whether we may write", self._judge)

    def upload(self, folder: Path, file: FileDigest) -> None:
        """Commit one shard to the work branch and compare the Hub's sha256 with ours."""
        self._prepare()
        self._send(f"upload {file.path}", lambda: self._upload(folder, file))

    def publish(self, folder: Path, files: Sequence[FileDigest]) -> Published:
        """Bring what is missing to the work branch, then everything to the branch in one commit."""
        before = self.visible()
        refuse_strangers(self.uri, before.files)
        first = compare(folder, files, before.files)
        if not first.is_empty:
            self._prepare()
            self._upload_missing(folder, [f for f in files if f.path.endswith(SHARD_ENDING)])
            self._send("commit the build", lambda: self._commit(folder, files))
        after = self.visible()
        self._require_whole(folder, files, after)
        self._ask("delete the work branch", lambda: self._delete_branch(self._work))
        url = f"{self._api.endpoint}/{self._repo}/tree/{after.revision}"
        return Published(after.revision, url, first)

    def staged(self, cache: Path) -> Source:
        """Return the work branch, or the published build where that branch is gone."""
        for revision in (self._work, self._branch):
            try:
                return HubSource(
                    self._repo,
                    revision,
                    cache,
                    endpoint=self._api.endpoint,
                    token=self._api.token if isinstance(self._api.token, str) else None,
                    patience=self._patience,
                )
            except SourceError:
                if revision == self._branch:
                    raise
        raise AssertionError("unreachable")

    def _prepare(self) -> None:
        """Create repository and branches where they are missing."""
        if not self._prepared:
            self._ask("create the repository", self._create)
            self._prepared = True

    def _judge(self) -> None:
        identity = self._api.whoami()
        require_writing_token(self.uri, identity)
        try:
            info = self._api.model_info(self._repo, timeout=60)
        except RepositoryNotFoundError:
            require_namespace(self.uri, self._repo, identity)
            return
        self._require_private(info)
        listing = self._listing(self._branch)
        refuse_strangers(self.uri, listing.files)
        # What a commit asks first. It sends nothing of a file that git keeps, and stores nothing.
        self._api.preupload_lfs_files(
            self._repo,
            [CommitOperationAdd("config.json", b"{}")],
            revision=self._branch if listing.revision else None,
        )

    def _create(self) -> None:
        try:
            info = self._api.model_info(self._repo, timeout=60)
        except RepositoryNotFoundError:
            self._api.create_repo(self._repo, private=self._private, exist_ok=True)
            info = self._api.model_info(self._repo, timeout=60)
        self._require_private(info)
        self._api.create_branch(self._repo, branch=self._branch, exist_ok=True)
        self._api.create_branch(self._repo, branch=self._work, revision=self._branch, exist_ok=True)

    def _require_private(self, info: ModelInfo) -> None:
        if self._private and not info.private:
            raise PublishError(
                f"{self.uri}: the recipe says `private: true`, and the repository is public. Make "
                "it private on its settings page, or change the recipe."
            )

    def _upload(self, folder: Path, file: FileDigest) -> None:
        found = self._paths([file])
        if is_same(file, folder, found.get(file.path)):
            return
        path = folder / file.path
        if not path.is_file():
            raise PublishError(
                f"{path}: the shard is neither here nor on branch {self._work} of {self._repo}. "
                "Run the conversion again: it makes what is missing."
            )
        self._api.create_commit(
            self._repo,
            [CommitOperationAdd(path_in_repo=file.path, path_or_fileobj=path)],
            commit_message=f"Add {file.path}",
            revision=self._work,
        )
        stored = self._paths([file]).get(file.path)
        if not is_same(file, folder, stored):
            raise IntegrityError(
                f"{path}: recorded were {file.size_bytes:,} bytes with sha256 {file.sha256}, "
                f"{self._repo} stored {_described(stored)}. The file changed on disk; delete it "
                "and run again."
            )
        _log.info("%s: uploaded to %s of %s", file.path, self._work, self._repo)

    def _upload_missing(self, folder: Path, shards: Sequence[FileDigest]) -> None:
        there = self._ask("list the shards", lambda: self._paths(shards))
        for shard in shards:
            if not is_same(shard, folder, there.get(shard.path)):
                self.upload(folder, shard)

    def _commit(self, folder: Path, files: Sequence[FileDigest]) -> None:
        """Make the one commit that people see, on top of what they see now."""
        now = self._listing(self._branch)
        refuse_strangers(self.uri, now.files)
        diff = compare(folder, files, now.files)
        if diff.is_empty:
            return
        work = str(self._api.model_info(self._repo, revision=self._work, timeout=60).sha)
        self._api.create_commit(
            self._repo,
            list(_operations(folder, diff, work)),
            commit_message=f"Publish a build made with glm-quant ({self._work[-12:]})",
            revision=self._branch,
            parent_commit=now.revision,
        )

    def _require_whole(self, folder: Path, files: Sequence[FileDigest], seen: Listing) -> None:
        for file in files:
            stored = seen.files.get(file.path)
            if not is_same(file, folder, stored):
                raise PublishError(
                    f"{self.uri}: {file.path} should have {file.size_bytes:,} bytes with sha256 "
                    f"{file.sha256}, commit {seen.revision} has {_described(stored)}. Somebody "
                    "else may be writing there; run again when they have finished."
                )

    def _delete_branch(self, branch: str) -> None:
        try:
            self._api.delete_branch(self._repo, branch=branch)
        except HfHubHTTPError as error:
            if error.response.status_code != 404:
                raise

    def _listing(self, revision: str) -> Listing:
        try:
            info = self._api.model_info(
                self._repo, revision=revision, files_metadata=True, timeout=60
            )
        except (RepositoryNotFoundError, RevisionNotFoundError):
            # A private repository that we may not see looks the same; creating it tells.
            return Listing("", {})
        siblings = info.siblings or ()
        files = [
            _remote_file(s.rfilename, s.size or 0, s.lfs.sha256 if s.lfs else None, s.blob_id)
            for s in siblings
        ]
        return Listing(str(info.sha), {file.name: file for file in files})

    def _paths(self, files: Iterable[FileDigest]) -> dict[str, SourceFile]:
        """Return what the work branch holds under some names."""
        found: list[Any] = self._api.get_paths_info(
            self._repo, [file.path for file in files], revision=self._work
        )
        return {
            entry.path: _remote_file(
                entry.path, entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id
            )
            for entry in found
            if hasattr(entry, "blob_id")
        }

    def _ask(self, what: str, action: Callable[[], T]) -> T:
        """Ask the Hub something, again while it may pass."""
        where = f"{self.uri}: {what}"
        return retry(self._translated(what, action), self._patience, where, PublishError)

    def _send(self, what: str, action: Callable[[], T]) -> T:
        """Send something to a Hub that has answered already, again while it may pass."""
        where, patience = f"{self.uri}: {what}", self._patience.enduring()
        attempt = self._translated(what, action)
        return retry(attempt, patience, where, PublishError, is_transfer=True)

    def _translated(self, what: str, action: Callable[[], T]) -> Callable[[], T]:
        """Return the action, raising what the exceptions of the library mean."""

        def attempt() -> T:
            try:
                return action()
            except (TransientError, PublishError, IntegrityError):
                raise
            except Exception as error:
                raise self._translate(what, error) from None

        return attempt

    def _translate(self, what: str, error: Exception) -> Exception:
        """Return what an exception of huggingface_hub means. The token is never part of it."""
        where = f"{self.uri}: {what}"
        # The library wraps whatever goes wrong while bytes are sent.
        sending = isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception)
        cause = error.__cause__ if sending and isinstance(error.__cause__, Exception) else error
        if isinstance(cause, HfHubHTTPError):
            code = cause.response.status_code
            # 403 of another host: the signed address has expired; the next try gets a new one. The
            # Hub's own is final: rights, a full storage, or "storage patterns".
            hub = origin(str(cause.response.url)) == origin(self._api.endpoint)
            expired = sending and code == 403 and not hub
            if code in _PASSING | _MOVED or code >= 500 or expired:
                return TransientError(
                    f"the Hub answered {code}", asked_wait(cause.response.headers)
                )
            said = self._without_token(cause.server_message or "")
            return PublishError(
                f"{where}: the Hub answered {code}{f' ({said})' if said else ''}. Check the "
                "repository's name, and that your token may write to it: log in with `hf auth "
                "login`, or set HF_TOKEN."
            )
        if isinstance(cause, LocalTokenNotFoundError):
            return PublishError(
                f"{where}: there is no token. Log in with `hf auth login`, or set HF_TOKEN."
            )
        if isinstance(cause, OfflineModeIsEnabled):
            return PublishError(f"{where}: HF_HUB_OFFLINE forbids to ask the Hub. Unset it.")
        if isinstance(cause, HFValidationError):
            return PublishError(f"{where}: this is no repository's name. Write hf://org/name.")
        if isinstance(cause, httpx2.TransportError | ConnectionError | TimeoutError):
            return connection_failure(f"{self._api.endpoint}", cause)
        if isinstance(cause, RuntimeError):  # hf_xet has no kinds of errors
            return TransientError(f"the upload: {type(cause).__name__}")
        if isinstance(cause, KeyError):
            return PublishError(f"{where}: the Hub's answer lacks {cause}. Check HF_ENDPOINT.")
        if isinstance(cause, ValueError):
            return PublishError(f"{where}: {self._without_token(str(cause))}")
        return error

    def _without_token(self, text: str) -> str:
        for token in (self._api.token, get_token()):
            if isinstance(token, str) and token:
                text = text.replace(token, "***")
        return " ".join(text.split())[:300]


def _operations(folder: Path, diff: Diff, work: str) -> Iterable[Any]:
    """Yield what the visible commit does: shards from the work branch, the rest from here."""
    for change in (*diff.added, *diff.changed):
        if change.name.endswith(SHARD_ENDING):
            yield CommitOperationCopy(change.name, change.name, src_revision=work)
        else:
            yield CommitOperationAdd(change.name, folder / change.name)
    for change in diff.deleted:
        yield CommitOperationDelete(change.name)


def _remote_file(name: str, size: int, sha256: str | None, blob: str | None) -> SourceFile:
    return SourceFile(name, size, f"sha256:{sha256}" if sha256 else f"git:{blob}", sha256 or None)


def _described(file: SourceFile | None) -> str:
    return f"{file.size_bytes:,} bytes with {file.identity}" if file else "no such file"
