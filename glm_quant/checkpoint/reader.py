"""A source checkpoint: its config, its tensors' places, and their values piece by piece.

Nothing here ever holds more than the rows that were asked for. BF16 has no numpy type: bytes are
read as u16 and viewed as bfloat16 by mlx.
"""

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any, Self, cast

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.fp8 import FP8_DTYPE, dequantize, scale_name
from glm_quant.checkpoint.header import (
    ITEM_SIZE,
    TensorInfo,
    header_length,
    parse_header,
    require_few_values,
)
from glm_quant.checkpoint.index import INDEX_NAME, Index, parse_index, require_index_size
from glm_quant.checkpoint.source import FolderSource, Source, SourceFile
from glm_quant.errors import CheckpointError, HeaderError, MissingTensorError

_NUMPY_VIEW = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "U32": np.uint32,
    "U8": np.uint8,
}
# A remote source answers a header in a fraction of a second: 282 one after another take a minute.
_HEADER_READERS = 8
# GLM-5.2's has 3 KB; one that lists every quantized module has some hundred.
_MAX_CONFIG_BYTES = 16 << 20


class Checkpoint:
    """A checkpoint at some source. Config and index are read at once, headers when asked for."""

    def __init__(self, source: Source) -> None:
        """Read config and index.

        Raises:
            CheckpointError: config.json is missing or no JSON object.
        """
        self.source = source
        self.files: Mapping[str, SourceFile] = source.files()
        self.config = self._read_config()
        self.index = self._read_index()

    @classmethod
    def open(cls, source: str | Path | Source) -> Self:
        """Open the checkpoint in a folder, or at a source (`glm_quant.hub.open_source`)."""
        if isinstance(source, str | Path):
            source = FolderSource(Path(source).expanduser())
        return cls(source)

    @property
    def missing_shards(self) -> list[str]:
        """Shards that the index names and the source does not hold."""
        return [name for name in self.index.shards if name not in self.files]

    @property
    def has_weights(self) -> bool:
        """Whether any shard is there: a plan can be made from config and index alone."""
        return any(name in self.files for name in self.index.shards)

    def require_weights(self) -> None:
        """Check that every shard is there.

        Raises:
            MissingTensorError: at least one is not.
        """
        if self.missing_shards:
            raise MissingTensorError(
                f"{self.source.uri}: {len(self.missing_shards)} of {len(self.index.shards)} shards "
                f"are missing, the first is {self.missing_shards[0]}. Fetch them and run again."
            )

    @cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor of the index by name, from the shards' headers.

        Raises:
            MissingTensorError: a shard or a tensor of the index is missing, or a shard holds one
                that the index does not name.
            HeaderError: a header lies.
        """
        self.require_weights()
        tensors: dict[str, TensorInfo] = {}
        with ThreadPoolExecutor(_HEADER_READERS, thread_name_prefix="header") as pool:
            headers = list(pool.map(self._read_header, self.index.shards))
        for shard, header in zip(self.index.shards, headers, strict=True):
            for name, tensor in header.items():
                placed = self.index.weight_map.get(name)
                if placed != shard:
                    raise CheckpointError(
                        f"{shard}: it holds tensor {name}, which {INDEX_NAME} places in "
                        f"{placed or 'no shard'}. Index and shards are of different builds; fetch "
                        "both again."
                    )
                tensors[name] = tensor
        for name, shard in self.index.weight_map.items():
            if name not in tensors:
                raise MissingTensorError(
                    f"{shard}: tensor {name} is not in it, although {INDEX_NAME} says so. Fetch "
                    "the shard again."
                )
        return tensors

    def read(self, name: str) -> mx.array:
        """Return a whole tensor in its stored dtype and shape; an FP8 weight as bfloat16."""
        return self.read_at(self.tensors[name])

    def read_at(self, info: TensorInfo) -> mx.array:
        """Return a tensor, or some rows of one (`TensorInfo.rows`)."""
        data = self.source.read(info.shard, info.begin, info.end)
        if info.dtype == FP8_DTYPE:
            codes = np.frombuffer(data, np.uint8).reshape(info.shape)
            first_row = (info.begin - self.tensors[info.name].begin) // info.shape[-1]
            bits = dequantize(codes, self._read_scales(info.name), first_row)
            return as_array(bits.data, "BF16", info.shape)
        return as_array(memoryview(data), info.dtype, info.shape)

    def _read_scales(self, weight: str) -> NDArray[np.float32]:
        """Return the scales of an FP8 weight."""
        info = self.tensors[scale_name(weight)]
        data = self.source.read(info.shard, info.begin, info.end)
        return np.frombuffer(data, np.float32).reshape(info.shape)

    def _read_config(self) -> dict[str, Any]:
        if "config.json" not in self.files:
            raise CheckpointError(
                f"{self.source.uri}: there is no config.json, so this is no checkpoint. Give "
                "--source the folder that holds config.json and the shards."
            )
        size = self.files["config.json"].size_bytes
        if size > _MAX_CONFIG_BYTES:
            raise CheckpointError(
                f"config.json: {size:,} bytes, more than the {_MAX_CONFIG_BYTES:,} that are "
                "accepted. Fetch the file again."
            )
        text = self.source.read("config.json")
        require_few_values(text, "config.json")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"config.json: this is not JSON ({error}).") from None
        if not isinstance(value, dict):
            raise CheckpointError("config.json: it holds no JSON object.")
        return cast("dict[str, Any]", value)

    def _read_index(self) -> Index:
        if INDEX_NAME in self.files:
            require_index_size(self.files[INDEX_NAME].size_bytes)
            return parse_index(self.source.read(INDEX_NAME))
        single = "model.safetensors"
        if single in self.files:
            return Index(dict.fromkeys(self._read_header(single), single), None)
        raise CheckpointError(
            f"{self.source.uri}: there is neither {INDEX_NAME} nor {single}. Fetch the index."
        )

    def _read_header(self, shard: str) -> dict[str, TensorInfo]:
        size = self.files[shard].size_bytes
        length = header_length(self.source.read(shard, 0, min(8, size)), shard, size)
        text = self.source.read(shard, 8, 8 + length)
        if len(text) != length:
            raise HeaderError(f"{shard}: the header has {len(text):,} of {length:,} bytes.")
        return parse_header(text, shard, size)


def as_array(data: memoryview, dtype: str, shape: tuple[int, ...]) -> mx.array:
    """Return stored bytes as an mlx array of the dtype and shape that the header gives.

    Raises:
        CheckpointError: a dtype that no GLM weight uses.
    """
    if dtype not in _NUMPY_VIEW:
        known = ", ".join(sorted(_NUMPY_VIEW))
        raise CheckpointError(f"dtype {dtype} ({ITEM_SIZE.get(dtype)} bytes) is not one of {known}")
    flat = mx.array(np.frombuffer(data, _NUMPY_VIEW[dtype]))
    return (flat.view(mx.bfloat16) if dtype == "BF16" else flat).reshape(shape)
