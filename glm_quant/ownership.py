"""Whose a workspace is: which recipe's build of which source stands there.

A build is the same one while its recipe's name and its source's are: an edited recipe or a new
commit of the same repository goes on in its workspace, and only what changed is made again. Another
build is never made over it unasked. A folder is known by its name, not by its path, so that it may
be moved; a repository or a prefix by its address without the revision.
"""

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from glm_quant.artifact import seal, unseal, write_atomic
from glm_quant.checkpoint.manifest import MANIFEST_NAME, load_manifest
from glm_quant.errors import CheckpointError, IntegrityError, OutputError
from glm_quant.litter import entries
from glm_quant.workspace import Workspace

OWNER_NAME = "owner.json"


class Owner(BaseModel):
    """The build that a workspace is for.

    Attributes:
        recipe: its name.
        source: what the source is known by, see `source_identity`.
        spec: what was asked for, with absolute paths: a later command asks for nothing again.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    recipe: str
    source: str
    spec: dict[str, JsonValue] = {}

    @classmethod
    def load(cls, workspace: Workspace) -> Self | None:
        """Return the build that a workspace is for; None where nothing says it."""
        path = workspace.records / OWNER_NAME
        try:
            return cls.model_validate_json(unseal(path.read_bytes(), path))
        except (OSError, IntegrityError, ValidationError):
            pass
        try:  # a finished build says it too
            manifest = load_manifest(workspace.checkpoint)
            return cls(recipe=str(manifest.recipe["name"]), source=source_identity(manifest.source))
        except (OSError, CheckpointError, KeyError):
            return None

    def save(self, workspace: Workspace) -> None:
        """Write it down; the caller holds the workspace."""
        text = self.model_dump_json(indent=2)
        write_atomic(workspace.records / OWNER_NAME, seal(text))

    def is_same_build(self, asked: "Owner") -> bool:
        """Whether both are the same build, in whatever state."""
        return (self.recipe, self.source) == (asked.recipe, asked.source)

    def describe(self) -> str:
        """Return both names."""
        return f"{self.recipe} of {self.source}"


def source_identity(source: str) -> str:
    """Return what a source is known by: a folder's name, or an address without the revision."""
    scheme, separator, rest = source.partition("://")
    if not separator or scheme == "file":
        return _folder(source).name
    address = rest.partition("@")[0] if scheme == "hf" else rest
    return f"{scheme}://{address.rstrip('/')}"


def source_name(source: str) -> str:
    """Return the last part of what a source is known by."""
    return source_identity(source).rpartition("/")[2]


def absolute_place(place: str) -> str:
    """Return a folder's absolute path; the address of anything else as it is."""
    is_folder = "://" not in place or place.startswith("file://")
    return str(_folder(place)) if is_folder else place


def require_owner(workspace: Workspace, asked: Owner, source: str, replace: bool) -> None:
    """Refuse to make a build where another one stands, or where its source would be deleted.

    Args:
        workspace: where it is to be made.
        asked: the build.
        source: its place.
        replace: whether it may take another build's place.

    Raises:
        OutputError: the workspace is another build's, or the source lies in it.
    """
    _require_source_outside(workspace, source)
    standing = Owner.load(workspace)
    if standing is None or replace or standing.is_same_build(asked) or not _holds_work(workspace):
        return
    state = "finished" if (workspace.checkpoint / MANIFEST_NAME).is_file() else "unfinished"
    place, option = (
        (workspace.root, "--workspace")
        if workspace.output is None
        else (workspace.checkpoint, "--output or --workspace")
    )
    raise OutputError(
        f"{place}: here stands another build, {standing.describe()} ({state}); asked for is "
        f"{asked.describe()}. Choose another {option}, or give --replace to make this one in its "
        "place."
    )


def _holds_work(workspace: Workspace) -> bool:
    """Whether anything was made that another build would cost."""
    return bool(
        entries(workspace.shard_records, "*.json")
        or (workspace.records / "calibrate.json").exists()
        or (workspace.checkpoint / MANIFEST_NAME).is_file()
    )


def _require_source_outside(workspace: Workspace, source: str) -> None:
    if "://" in source and not source.startswith("file://"):
        return
    folder = _folder(source)
    for volatile in (workspace.source, workspace.scratch, workspace.partial, workspace.previous):
        if folder.is_relative_to(volatile.resolve()):
            raise OutputError(
                f"{source}: the source lies in {volatile}, which is emptied as the build goes on. "
                "Move it out of the workspace."
            )


def _folder(place: str) -> Path:
    return Path(place.removeprefix("file://")).expanduser().resolve()
