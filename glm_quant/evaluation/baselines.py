"""Builds that a recipe names to be compared with: where their figures come from.

A checkpoint, in a workspace or by itself, is measured as the build itself is, unless its workspace
has figures that were measured so. Of a workspace whose checkpoint is gone the record is read, which
the recipe's settings must fit: see `protocols`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from pydantic import JsonValue

from glm_quant.artifact import sha256_file
from glm_quant.checkpoint.manifest import MANIFEST_NAME, load_manifest
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import InputError, RecipeError
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.records import EvaluationRecord
from glm_quant.fingerprint import fingerprint


@dataclass(frozen=True)
class Baseline:
    """One of them.

    Attributes:
        name: what the recipe calls it.
        identity: sha256 of the record's file, or of what identifies the checkpoint.
        place: the folder of the checkpoint, or of the workspace that the record stands in.
        evaluation: the workspace's record; None for a checkpoint by itself.
        checkpoint: the folder to measure; None where only the record is left.
    """

    name: str
    identity: str
    place: Path
    evaluation: EvaluationRecord | None = None
    checkpoint: Path | None = None

    def is_of(self, source: Checkpoint) -> bool:
        """Whether it is a build whose manifest names this source's shards, by size and sha256."""
        if self.checkpoint is None or not (self.checkpoint / MANIFEST_NAME).is_file():
            return False
        for name, value in load_manifest(self.checkpoint).source_files.items():
            shard, told = source.files.get(name), cast("dict[str, JsonValue]", value)
            if shard is None or shard.size_bytes != told["size_bytes"]:
                return False
            # A folder promises no digest.
            if None not in (shard.sha256, told["sha256"]) and shard.sha256 != told["sha256"]:
                return False
        return True

    def divergence(self) -> tuple[DivergenceRecord, Path] | None:
        """Return the workspace's divergence record and what its outputs are relative to."""
        if self.evaluation is None:
            return None
        record = DivergenceRecord.load(self.place / "records" / "divergence.json")
        return None if record is None else (record, self.place)


def parse_baselines(given: Sequence[str]) -> dict[str, str]:
    """Return places by name from the command line's NAME=PLACE.

    Raises:
        InputError: one has no name or no place.
    """
    found: dict[str, str] = {}
    for each in given:
        name, _, place = each.partition("=")
        if not (name and place):
            raise InputError(f"--baseline {each}: give NAME=PLACE, such as golden=PATH/work.")
        found[name] = place
    return found


def open_baseline(name: str, place: str) -> Baseline:
    """Find a baseline.

    Args:
        name: what the recipe calls it.
        place: a workspace, an evaluation's record in one, or the folder of a checkpoint.

    Raises:
        RecipeError: it is none of these, or was not evaluated.
    """
    path = Path(place).expanduser().absolute()
    record = path if path.suffix == ".json" else path / "records" / "evaluate.json"
    if record.is_file():
        found = EvaluationRecord.load(record)
        if found is None:
            raise RecipeError(
                f"{record}: this record of baseline {name!r} is damaged, or of a version that is "
                "not read any more. Evaluate that build again, or name its checkpoint's folder."
            )
        workspace = record.parents[1]
        checkpoint = workspace / "checkpoint"
        if not (checkpoint / "config.json").is_file():
            return Baseline(name, sha256_file(record), workspace, found)
        return Baseline(name, build_identity(checkpoint), workspace, found, checkpoint)
    if (path / "config.json").is_file():
        return Baseline(name, build_identity(path), path, checkpoint=path)
    raise RecipeError(
        f"{place}: baseline {name!r} is no workspace with records/evaluate.json, no such record "
        "and no folder of a checkpoint. Evaluate that build first, or correct the path."
    )


def build_identity(build: Path) -> str:
    """Return the sha256 of the build's manifest, or of its files' identities if it has none."""
    manifest = build / MANIFEST_NAME
    if manifest.is_file():
        return sha256_file(manifest)
    files = Checkpoint.open(build).files
    return fingerprint({name: file.identity for name, file in files.items()})
