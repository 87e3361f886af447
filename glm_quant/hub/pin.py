"""A build of a branch goes on with the commit that it was begun with.

A conversion takes hours and may be run again; meanwhile the branch may move. So the commit is
recorded in the workspace, under its lock, before the first shard is fetched, and whoever gives the
same URI again gets the same commit until the build is finished. Another revision in the URI, or a
deleted record, overrides it.
"""

import logging

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from glm_quant.artifact import seal, unseal, write_atomic
from glm_quant.errors import IntegrityError, SourceError
from glm_quant.hub.huggingface import HubSource, parse_hub_uri
from glm_quant.workspace import Workspace

_log = logging.getLogger(__name__)


class Pin(BaseModel):
    """The commit that a revision was when a build was begun."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    repo: str
    revision: str
    commit: str = Field(pattern="^[0-9a-f]{40}$")


def open_hub(uri: str, workspace: Workspace | None, window: int) -> HubSource:
    """Open a repository on the Hub for a build, at the commit that the build was begun with.

    Raises:
        SourceError: it cannot be had; where the recorded commit is at fault, the record is named.
    """
    repo, revision = parse_hub_uri(uri)
    if workspace is None:
        return HubSource(repo, revision, window=window)
    pin = _load(workspace)
    if pin is not None and (pin.repo, pin.revision) == (repo, revision):
        _log.info("%s: this build was begun with commit %s and goes on with it", uri, pin.commit)
        try:
            return HubSource(repo, pin.commit, workspace.source, window)
        except SourceError as error:
            raise SourceError(
                f"{error} This build was begun with that commit, says {workspace.pin}; to begin "
                f"anew with {revision} as it is now, delete that file."
            ) from None

    def record(commit: str) -> None:
        begun = Pin(repo=repo, revision=revision, commit=commit)
        write_atomic(workspace.pin, seal(begun.model_dump_json(indent=2)))

    return HubSource(repo, revision, workspace.source, window, on_pin=record)


def _load(workspace: Workspace) -> Pin | None:
    """Read the record; one that cannot be read is none."""
    try:
        return Pin.model_validate_json(unseal(workspace.pin.read_bytes(), workspace.pin))
    except (FileNotFoundError, IntegrityError, ValidationError):
        return None
