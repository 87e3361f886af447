"""A model repository on the Hugging Face Hub, at one commit.

The list comes from `HfApi.model_info`; bytes come from `/resolve/{commit}/{path}`, which answers
with the bytes or sends on to a CDN by a signed address that lives about an hour. Each try begins at
`/resolve` again, so an expired address heals itself. The token goes to the Hub's own origin only,
and neither it nor a signed address is ever part of a message.
"""

import os
import re
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import HfApi, get_session, hf_hub_url, set_client_factory
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils._http import default_client_factory

from glm_quant.checkpoint.source import SourceFile
from glm_quant.errors import SourceError
from glm_quant.hub.remote import RemoteSource
from glm_quant.hub.retry import Patience, TransientError, asked_wait, connection_failure, retry
from glm_quant.hub.window import DEFAULT_WINDOW

_REDIRECTS = 6
_INFO_SECONDS = 60.0
_RETRIED = {408, 416, 425, 429}

# The library's own session has no limit at all; `read` is how long nothing may come.
TIMEOUT = httpx2.Timeout(30.0, connect=10.0)
# What is not a download: a commit of many files takes the Hub tens of seconds.
_LIMIT = httpx2.Timeout(180.0, connect=10.0)


class HubSource(RemoteSource):
    """A repository on the Hub."""

    def __init__(
        self,
        repo: str,
        revision: str = "main",
        cache: Path | None = None,
        window: int = DEFAULT_WINDOW,
        *,
        endpoint: str | None = None,
        token: str | None = None,
        patience: Patience | None = None,
        timeout: httpx2.Timeout = TIMEOUT,
        on_pin: Callable[[str], None] | None = None,
    ) -> None:
        """Pin the commit and list the files.

        Args:
            repo: "org/name".
            revision: branch, tag or commit.
            cache: see `RemoteSource`.
            window: see `RemoteSource`.
            endpoint: default: HF_ENDPOINT, else huggingface.co.
            token: default: HF_TOKEN, else what `hf auth login` stored.
            patience: how often to try.
            timeout: for each step of a request.
            on_pin: called once with the commit, when the first shard is wanted.

        Raises:
            SourceError: no such repository or revision, no access, or the Hub cannot be reached.
        """
        patience = patience or Patience()
        api = hub_client(endpoint, token)
        place = HubPlace(api, repo, revision, patience, timeout)
        super().__init__(place, cache, window, patience, on_pin and partial(on_pin, place.commit))


def hub_client(endpoint: str | None = None, token: str | None = None) -> HfApi:
    """Return the library's client of a Hub.

    Args:
        endpoint: default: HF_ENDPOINT as it is now (the library takes what it was when it was
            imported), else huggingface.co.
        token: default: HF_TOKEN, else what `hf auth login` stored.
    """
    endpoint = endpoint or os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    return HfApi(endpoint=endpoint, token=token, library_name="glm-quant")


class HubPlace:
    """One commit of a repository."""

    def __init__(
        self,
        api: HfApi,
        repo: str,
        revision: str,
        patience: Patience,
        timeout: httpx2.Timeout,
    ) -> None:
        """Pin the commit and list the files."""
        self._api = api
        self._repo = repo
        self._timeout = timeout
        info = retry(lambda: self._model_info(revision), patience, f"hf://{repo}@{revision}")
        self._commit = str(info.sha)
        self._files = {
            file.name: file for file in map(_source_file, info.siblings or ()) if file is not None
        }

    @property
    def commit(self) -> str:
        """The pinned commit."""
        return self._commit

    @property
    def uri(self) -> str:
        """`hf://org/name@commit`."""
        return f"hf://{self._repo}@{self._commit}"

    @property
    def files(self) -> Mapping[str, SourceFile]:
        """The files of the repository's root by name."""
        return self._files

    @contextmanager
    def open_at(self, name: str, begin: int, end: int) -> Generator[Iterator[bytes]]:
        """Open bytes `begin` to `end` of a file, following the Hub to its CDN."""
        size = self._files[name].size_bytes
        url = hf_hub_url(self._repo, name, revision=self._commit, endpoint=self._api.endpoint)
        headers = build_hf_headers(token=self._api.token, library_name="glm-quant")
        headers["Accept-Encoding"] = "identity"
        if begin > 0 or end < size:
            headers["Range"] = f"bytes={begin}-{end - 1}"
        try:
            for _ in range(_REDIRECTS):
                with get_session().stream(
                    "GET", url, headers=headers, follow_redirects=False, timeout=self._timeout
                ) as answer:
                    if answer.is_redirect:
                        target = urljoin(url, answer.headers["location"])
                        if origin(target) != origin(url):
                            headers.pop("authorization", None)
                        url = target
                        continue
                    self._refuse(answer, name, begin, end, size)
                    yield _pieces(answer, begin, end, size)
                    return
        except httpx2.TransportError as error:
            raise connection_failure(f"{urlsplit(url).hostname}", error) from None
        except (httpx2.InvalidURL, OfflineModeIsEnabled) as error:
            raise SourceError(f"{name} of {self.uri}: {error}.") from None
        raise SourceError(f"{name} of {self.uri}: sent on {_REDIRECTS} times without an answer.")

    def _refuse(self, answer: httpx2.Response, name: str, begin: int, end: int, size: int) -> None:
        """Raise for whatever is not the asked range, or the whole file where all was sent."""
        code, host = answer.status_code, urlsplit(str(answer.url)).hostname
        hub = origin(str(answer.url)) == origin(self._api.endpoint)
        if code in (200, 206):
            said, right = _announced(answer, begin, end, size)
            if said != right:
                raise TransientError(f"{host} announces {said}, it should be {right}")
        elif code in _RETRIED or code >= 500 or (code == 403 and not hub):
            # 403 from the CDN: the signed address has expired; the next try gets a new one.
            raise TransientError(f"{host} answered {code}", asked_wait(answer.headers))
        elif code in (401, 403):
            raise SourceError(
                f"{name} of {self.uri}: {host} answered {code}. If the repository is private or "
                "gated, ask for access on its page and log in with `hf auth login`, or set "
                "HF_TOKEN."
            )
        else:
            raise SourceError(
                f"{name} of {self.uri}: {host} answered {code}. Check the repository and its files."
            )

    def _model_info(self, revision: str) -> Any:
        """Ask for commit and files in one answer, so that no other commit comes in between."""
        where = f"hf://{self._repo}@{revision}"
        try:
            return self._api.model_info(
                self._repo, revision=revision, files_metadata=True, timeout=_INFO_SECONDS
            )
        except RevisionNotFoundError:
            raise SourceError(
                f"{where}: the repository has no revision {revision}. Give a branch, a tag or a "
                "commit after the @."
            ) from None
        except GatedRepoError:
            raise SourceError(
                f"{where}: access to this repository is gated. Ask for access on its page and log "
                "in with `hf auth login`, or set HF_TOKEN."
            ) from None
        except RepositoryNotFoundError:
            raise SourceError(
                f"{where}: {self._api.endpoint} has no such repository, or it is private. Check "
                "the name; for a private one log in with `hf auth login`, or set HF_TOKEN."
            ) from None
        except HfHubHTTPError as error:
            code = error.response.status_code
            if code in _RETRIED or code >= 500:
                wait = asked_wait(error.response.headers)
                raise TransientError(f"{self._api.endpoint} answered {code}", wait) from None
            raise SourceError(
                f"{where}: {self._api.endpoint} answered {code}. Check HF_ENDPOINT and HF_TOKEN."
            ) from None
        except HFValidationError:
            raise SourceError(
                f"{where}: this is no repository's name. Write hf://org/name@revision."
            ) from None
        except OfflineModeIsEnabled:
            raise SourceError(
                f"{where}: HF_HUB_OFFLINE forbids to ask the Hub. Unset it, or give a folder."
            ) from None
        except httpx2.TransportError as error:
            raise connection_failure(self._api.endpoint, error) from None
        except ValueError:
            raise TransientError(f"{self._api.endpoint} answered no JSON") from None


@cache
def limit_time() -> None:
    """Give the library's one session a time limit: a server that falls silent must not hold us."""

    def make() -> httpx2.Client:
        client = default_client_factory()
        client.timeout = _LIMIT
        return client

    set_client_factory(make)


def parse_hub_uri(uri: str) -> tuple[str, str]:
    """Return repository and revision of `hf://org/name[@revision]`.

    Raises:
        SourceError: it is no such URI.
    """
    repo, separator, revision = uri.removeprefix("hf://").strip("/").partition("@")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo) or (separator and not revision):
        raise SourceError(f"{uri}: write hf://org/name or hf://org/name@revision.")
    return repo, revision or "main"


def _source_file(sibling: Any) -> SourceFile | None:
    """Return a file of the repository's root; what lies deeper is not part of a checkpoint."""
    name, size = str(sibling.rfilename), sibling.size
    if "/" in name or "\\" in name or name.startswith(".") or size is None:
        return None
    if sibling.lfs is not None:
        digest = str(sibling.lfs.sha256)
        return SourceFile(name, int(size), f"sha256:{digest}", digest)
    return SourceFile(name, int(size), f"git:{sibling.blob_id}")


def _announced(answer: httpx2.Response, begin: int, end: int, size: int) -> tuple[str | None, str]:
    """Return what an answer says that it brings, and what it should bring."""
    if answer.status_code == 206:
        return answer.headers.get("content-range"), f"bytes {begin}-{end - 1}/{size}"
    return answer.headers.get("content-length", f"{size}"), f"{size}"


def origin(url: str) -> tuple[str, str | None, int | None]:
    """Return scheme, host and port of an address."""
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _pieces(answer: httpx2.Response, begin: int, end: int, size: int) -> Iterator[bytes]:
    """Yield the asked bytes, also from a server that ignored Range and sends the whole file.

    What comes after the file's end is yielded too: whoever counts takes it for the lie it is.
    """
    position = begin if answer.status_code == 206 else 0
    # No piece size: what was received before a cut would be lost in the library's buffer.
    for raw in answer.iter_raw():
        first = max(0, begin - position)
        last = len(raw) if end == size else min(len(raw), end - position)
        position += len(raw)
        if first < last:
            yield raw[first:last]
        if position >= end and end < size:
            return
