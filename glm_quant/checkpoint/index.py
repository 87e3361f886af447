"""`model.safetensors.index.json`: which shard holds which tensor.

File names in it are data from elsewhere: a name that could leave the checkpoint's folder is refused
before any path is made from it.
"""

import json
import re
from dataclasses import dataclass
from typing import Any, cast

from glm_quant.checkpoint.header import require_few_values, shorten
from glm_quant.errors import HeaderError

INDEX_NAME = "model.safetensors.index.json"
# The GLM-5.2 release's index has 5.4 MB, its FP8 sibling's about twice that.
MAX_INDEX_BYTES = 64 << 20
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


@dataclass(frozen=True)
class Index:
    """The weight map, in the file's order, and the total size that the index claims."""

    weight_map: dict[str, str]
    total_size: int | None

    @property
    def shards(self) -> list[str]:
        """Shard names in lexicographic order."""
        return sorted(set(self.weight_map.values()))


def require_index_size(size_bytes: int) -> None:
    """Check an index's size, which is known before it is read.

    Raises:
        HeaderError: it is larger than any real one.
    """
    if size_bytes > MAX_INDEX_BYTES:
        raise HeaderError(
            f"{INDEX_NAME}: {size_bytes:,} bytes, more than the {MAX_INDEX_BYTES:,} that are "
            "accepted. Fetch the file again."
        )


def parse_index(text: bytes) -> Index:
    """Read an index.

    Raises:
        HeaderError: malformed, or a shard name that is no plain file name.
    """
    require_index_size(len(text))
    require_few_values(text, INDEX_NAME)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise HeaderError(
            f"{INDEX_NAME}: this is not JSON ({error}). Fetch the file again."
        ) from None
    fields = cast("dict[str, Any]", value) if isinstance(value, dict) else {}
    weight_map = fields.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise HeaderError(f"{INDEX_NAME}: it has no weight_map. Fetch the file again.")
    names = cast("dict[str, Any]", weight_map)
    for tensor, shard in names.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise HeaderError(
                f"{INDEX_NAME}: tensor {shorten(tensor)} lies in {shorten(shard)}, which is no "
                "plain .safetensors file name. Do not trust this checkpoint."
            )
    metadata = fields.get("metadata")
    total = (
        cast("dict[str, Any]", metadata).get("total_size") if isinstance(metadata, dict) else None
    )
    return Index(cast("dict[str, str]", names), total if isinstance(total, int) else None)
