"""Where a finished build goes.

Every target keeps the same promises, each by its own means:

- what is uploaded ahead of time is out of everybody's sight, and resumes after any interruption;
- one last act makes the build visible, whole, and removes what an earlier build left;
- doing it again is harmless, and a target that was made by somebody else is left alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Protocol

from glm_quant.artifact import FileDigest
from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.checkpoint.manifest import MANIFEST_NAME
from glm_quant.checkpoint.source import Source, SourceFile
from glm_quant.errors import PublishError
from glm_quant.hub.remote import content_identity
from glm_quant.quantize.assemble import COMPANIONS, RUNTIME_NAME
from glm_quant.workspace import SHARD_NAME

SHARD_ENDING = ".safetensors"


@dataclass(frozen=True)
class Listing:
    """What people see at a target now.

    Attributes:
        revision: its version, in the target's own words; empty where there is nothing.
        files: by name, with the identity that the target itself gives them.
    """

    revision: str
    files: Mapping[str, SourceFile]


@dataclass(frozen=True)
class Change:
    """One file of a difference."""

    name: str
    size_bytes: int


@dataclass(frozen=True)
class Diff:
    """What publishing a build changes at a target."""

    added: tuple[Change, ...]
    changed: tuple[Change, ...]
    deleted: tuple[Change, ...]
    unchanged: tuple[Change, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the target shows the build already."""
        return not (self.added or self.changed or self.deleted)

    def describe(self) -> str:
        """Return one line for a person."""
        return ", ".join(
            f"{len(files)} {kind} ({sum(file.size_bytes for file in files) / 1e6:,.1f} MB)"
            for kind, files in vars(self).items()
        )


@dataclass(frozen=True)
class Published:
    """A build that people see.

    Attributes:
        revision: its version at the target; empty for a folder.
        url: where a person finds it.
        diff: what the last act changed; empty if it was there already.
    """

    revision: str
    url: str
    diff: Diff


class Target(Protocol):
    """A place that takes a build."""

    @property
    def uri(self) -> str:
        """Its address, without any secret."""
        ...

    def visible(self) -> Listing:
        """Return what people see now.

        Raises:
            PublishError: it cannot be reached, or may not be read.
        """
        ...

    def judge(self, folder: Path) -> None:
        """Ask, before the work, whether a build in `folder` could be published here.

        Nothing that anybody sees is written.

        Raises:
            PublishError: the target refuses us, holds something else, or cannot be reached
                (`may_pass`).
        """
        ...

    def upload(self, folder: Path, file: FileDigest) -> None:
        """Bring one file of the coming build there, out of sight; return when it is proved there.

        Raises:
            PublishError: the target refuses, or cannot be reached.
            IntegrityError: the file is not what was recorded.
        """
        ...

    def publish(self, folder: Path, files: Sequence[FileDigest]) -> Published:
        """Make the build visible at once. Shards that were uploaded need not be in `folder`.

        Raises:
            PublishError: the target refuses, cannot be reached, or holds something else.
            IntegrityError: a file is not what was recorded.
        """
        ...

    def staged(self, cache: Path) -> Source:
        """Return what was uploaded, or published, as a source.

        Raises:
            SourceError: there is nothing, or it cannot be reached.
        """
        ...


def is_same(file: FileDigest, folder: Path, remote: SourceFile | None) -> bool:
    """Whether a target's file is ours, by the target's own sha256 or git id.

    A git id is only given to small files, which are always at hand in `folder`.
    """
    if remote is None or remote.size_bytes != file.size_bytes:
        return False
    if remote.identity.startswith("git:"):
        path = folder / file.path
        return path.is_file() and content_identity("git:", path.read_bytes()) == remote.identity
    return remote.identity == f"sha256:{file.sha256}"


def compare(folder: Path, files: Sequence[FileDigest], there: Mapping[str, SourceFile]) -> Diff:
    """Return what has to change at a target that shows `there`."""
    added: list[Change] = []
    changed: list[Change] = []
    unchanged: list[Change] = []
    for file in files:
        remote = there.get(file.path)
        same = is_same(file, folder, remote)
        (unchanged if same else added if remote is None else changed).append(
            Change(file.path, file.size_bytes)
        )
    ours = {file.path for file in files}
    deleted = [
        Change(name, file.size_bytes)
        for name, file in sorted(there.items())
        if name not in ours and may_be_stale(name)
    ]
    return Diff(tuple(added), tuple(changed), tuple(deleted), tuple(unchanged))


def refuse_strangers(uri: str, there: Mapping[str, SourceFile]) -> None:
    """Leave alone what others made.

    Raises:
        PublishError: there are weights, and no manifest of ours beside them.
    """
    weights = sorted(name for name in there if name.endswith((SHARD_ENDING, ".bin")))
    if weights and MANIFEST_NAME not in there:
        raise PublishError(
            f"{uri}: it holds a model that is no build of glm-quant ({weights[0]} and "
            f"{len(weights) - 1} more weight files, no {MANIFEST_NAME}). Choose another target."
        )


def may_be_stale(name: str) -> bool:
    """Whether an earlier build of ours may have brought a file. Nobody else's file is deleted."""
    path = PurePosixPath(name)
    if path.parent == PurePosixPath("assets"):
        return path.suffix == ".png"
    made = (*COMPANIONS, INDEX_NAME, MANIFEST_NAME, RUNTIME_NAME)
    return name in made or (len(path.parts) == 1 and SHARD_NAME.fullmatch(name) is not None)
