"""`manifest.json`: the account of every byte that travels inside an output.

It holds nothing that differs between two runs of the same conversion (no time, machine or local
path), so it is itself reproducible. What a run measured stands in the workspace's records.
"""

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from glm_quant.artifact import FileDigest, seal, unseal, write_atomic
from glm_quant.errors import CheckpointError

MANIFEST_NAME = "manifest.json"


class ManifestShard(BaseModel):
    """One output shard: its digest, its tensors' digests, and the source blocks they came from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: FileDigest
    tensors: dict[str, str]
    sources: dict[str, list[str]]


class Manifest(BaseModel):
    """What the output is made of.

    Attributes:
        format: version of this layout.
        fingerprint: of the shards' digests; the same fingerprint means the same weights.
        source: URI or folder name of the source.
        source_files: size and, where the source promises one, sha256 of each source shard.
        recipe: the recipe as it was parsed.
        versions: packages that decide bytes.
        totals: parameters, tensor bytes, tensors, bits per weight.
        census: parameters of each component group by how they are stored, as planned.
        imatrix: sha256 of each file of the importance matrix that the codes were chosen with.
        shards: the weights.
        files: everything else that this package wrote (config, index, tokenizer, runtime).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = 1
    fingerprint: str
    source: str
    source_files: dict[str, JsonValue]
    recipe: dict[str, Any]
    versions: dict[str, str]
    totals: dict[str, float]
    census: dict[str, dict[str, int]] = Field(default_factory=dict[str, dict[str, int]])
    block_elements: int
    imatrix: dict[str, str] = Field(default_factory=dict[str, str])
    shards: list[ManifestShard]
    files: list[FileDigest]

    def save(self, folder: Path) -> None:
        """Write it, sealed; where it stands, the output is whole."""
        write_atomic(folder / MANIFEST_NAME, seal(self.model_dump_json(indent=2)))


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a finished output.

    Raises:
        CheckpointError: there is none, or it cannot be read.
        IntegrityError: it is not as it was written.
    """
    path = folder / MANIFEST_NAME
    try:
        return Manifest.model_validate_json(unseal(path.read_bytes(), path))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: there is no {MANIFEST_NAME}, so this is no finished output of glm-quant."
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(
            f"{path}: the manifest cannot be read ({'.'.join(map(str, first['loc']))}: "
            f"{first['msg']}). It was changed or cut; make or fetch the output again."
        ) from None
