"""Whether a build's targets and disks can take what will be made, asked before the work.

What a target refuses is told in the first seconds, not after hours: who we are there, whether we
may write, and whether it holds something of somebody else. A target that does not answer now may
answer when the first shard is finished, so it is told and the work begins. Disks are judged by the
plan's own numbers, here and again between the shards.
"""

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm_quant.build import Build
from glm_quant.errors import DiskSpaceError, PublishError
from glm_quant.hub.retry import Patience
from glm_quant.settings import BUILT_IN_SLICES, TokenSettings
from glm_quant.stages.upload import build_id, is_folder
from glm_quant.streaming.memory_plan import disk_bytes

_log = logging.getLogger(__name__)

# Nobody waits minutes for an answer that can also come later.
_PATIENCE = Patience(tries=4, unresolved_seconds=2.0)


@dataclass(frozen=True)
class Need:
    """Bytes that will be written below a folder."""

    folder: Path
    purpose: str
    size_bytes: int


def judge_targets(build: Build) -> None:
    """Refuse, before the work, what a target or a disk would refuse at its end.

    Raises:
        PublishError: a target refuses us, or holds something that is no build of ours.
        DiskSpaceError: a disk has too little room.
    """
    require_room(build)
    for uri in build.targets:
        try:
            target = build.open_target(uri, build_id(build), _PATIENCE)
            target.judge(build.workspace.checkpoint)
        except PublishError as error:
            if not error.may_pass:
                raise
            _log.warning(
                "%s The work begins all the same; whether this target takes the build is seen "
                "with the first shard that is sent, at the latest when it is published.",
                error,
            )


def require_room(build: Build) -> None:
    """Compare what will be written on each disk with what is free there.

    Raises:
        DiskSpaceError: a disk has too little room; names each purpose with its bytes.
    """
    disks: dict[int, list[Need]] = {}
    for need in _needs(build):
        disks.setdefault(_existing(need.folder).stat().st_dev, []).append(need)
    for needs in disks.values():
        folder = _existing(needs[0].folder)
        free, needed = shutil.disk_usage(folder).free, sum(need.size_bytes for need in needs)
        if needed > free:
            parts = ", ".join(
                f"{need.purpose} {need.size_bytes / 1e9:,.2f} GB"
                for need in needs
                if need.size_bytes
            )
            raise DiskSpaceError(
                f"{folder}: this run writes {needed / 1e9:,.2f} GB to this disk ({parts}), and "
                f"{free / 1e9:,.2f} GB are free. Free {(needed - free) / 1e9:,.2f} GB, or choose "
                "another disk with --workspace or --publish."
            )


def _needs(build: Build) -> Iterator[Need]:
    """Yield what is still to be written: output, source window, hidden states, copies."""
    root, outputs = build.workspace.root, build.conversion.outputs
    total = sum(shard.size_bytes for shard in build.plan.shards)
    missing = build.conversion.missing_bytes(build.evicts_shards)
    yield Need(root, "output", missing)
    if missing:
        window = max(outputs.peak_disk_bytes - total, build.kept_source_bytes)
        yield Need(root, "source shards", window)
    yield Need(root, "hidden states", _state_bytes(build))
    for uri in filter(is_folder, build.targets):
        folder = Path(uri.removeprefix("file://")).expanduser().absolute()
        if not _share_a_disk(folder, build.workspace.checkpoint):
            there = sum(_size(folder / shard.name) for shard in build.plan.shards)
            yield Need(folder, "published copy", max(0, total - there))


def _state_bytes(build: Build) -> int:
    """Return what one pass over the texts keeps on disk at most, for a pass that is to come."""
    records, geometry = build.workspace.records, build.plan.glm_geometry
    passes: dict[str, TokenSettings | None] = {
        "divergence": build.recipe.divergence,
        "calibrate": build.recipe.own_calibration,
    }
    tokens = [
        settings.tokens * len(settings.texts or BUILT_IN_SLICES)
        for stage, settings in passes.items()
        if settings is not None and not (records / f"{stage}.json").exists()
    ]
    return disk_bytes(geometry, max(tokens, default=0))


def _share_a_disk(folder: Path, other: Path) -> bool:
    return _existing(folder).stat().st_dev == _existing(other).stat().st_dev


def _existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that is there."""
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0
