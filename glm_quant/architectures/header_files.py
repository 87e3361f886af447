"""Weight files without weights: what mlx-lm's loader needs in order to say what it would load."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from glm_quant.checkpoint.header import TensorInfo

# What MLX calls dtypes that it has no arrays of: their bytes, as it loads FP8 itself.
_AS_BYTES = {"F8_E4M3": "U8", "F8_E5M2": "U8", "F8_E8M0": "U8"}


def write_header_files(
    folder: Path, config: Mapping[str, Any], tensors: Iterable[TensorInfo]
) -> None:
    """Write `config.json` and one safetensors file whose data are a hole.

    All tensors point at the same bytes, so the hole is only as long as the largest of them; a
    loader that does not evaluate them reads none of it.

    Args:
        folder: an empty folder.
        config: the checkpoint's config.
        tensors: the checkpoint's tensors, of which name, dtype and shape count.
    """
    header: dict[str, Any] = {}
    longest = 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": _AS_BYTES.get(tensor.dtype, tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [0, tensor.size_bytes],
        }
        longest = max(longest, tensor.size_bytes)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + longest)
