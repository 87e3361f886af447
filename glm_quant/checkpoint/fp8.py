"""FP8 checkpoints: e4m3 codes with one float32 scale for each block of 128 × 128.

`X.weight` [out, in] is F8_E4M3, `X.weight_scale_inv` F32 [⌈out/128⌉, ⌈in/128⌉], and the weight is
code · scale, rounded to bfloat16, as DeepSeek's `weight_dequant`, transformers and mlx-lm have it.
What a reader would get wrong: "inv" is not to be divided by.
"""

from collections.abc import Mapping
from functools import cache
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.header import TensorInfo, shorten
from glm_quant.compiled import compiled
from glm_quant.errors import CheckpointError, MissingTensorError, ShapeError

FP8_DTYPE = "F8_E4M3"
BLOCK = 128
_SUFFIX = "_scale_inv"

WARNING = (
    "The source is an FP8 release: its weights were rounded to 8 bits once already, which costs "
    "about as much as quantizing to between 5 and 6 bits. Use the BF16 release where you can."
)


def scale_name(weight: str) -> str:
    """Return the name of the scales that belong to a weight."""
    return weight + _SUFFIX


def scaled_weight(name: str) -> str | None:
    """Return the weight that a tensor holds the scales of, None for any other tensor."""
    return name.removesuffix(_SUFFIX) if name.endswith(_SUFFIX) else None


def check_fp8_config(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes an FP8 checkpoint.

    Raises:
        CheckpointError: it describes some other quantization, which is no source to convert from.
    """
    quantization = config.get("quantization_config")
    if quantization is None:
        if "quantization" in config:
            raise CheckpointError(
                "config.json: `quantization` says that this checkpoint was quantized for MLX "
                "already. Use the BF16 release as the source."
            )
        return False
    fields = cast("dict[str, Any]", quantization) if isinstance(quantization, dict) else {}
    method, blocks = fields.get("quant_method"), fields.get("weight_block_size")
    if method != "fp8" or blocks != [BLOCK, BLOCK]:
        raise CheckpointError(
            f"config.json: quantization_config has quant_method {shorten(method)} and "
            f"weight_block_size {shorten(blocks)}; of quantized sources only 'fp8' in blocks of "
            f"{BLOCK} × {BLOCK} can be read. Use the BF16 release."
        )
    return True


def check_scales(info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> None:
    """Check that an FP8 weight has its scales.

    Raises:
        MissingTensorError: it has none.
        ShapeError: they have another shape or dtype.
    """
    scales = tensors.get(scale_name(info.name))
    if scales is None:
        raise MissingTensorError(
            f"{info.shard}: tensor {info.name} is {FP8_DTYPE}, but there is no "
            f"{scale_name(info.name)}. Fetch index and shards again."
        )
    wanted = tuple(-(-dim // BLOCK) for dim in info.shape)
    if scales.shape != wanted or scales.dtype != "F32" or len(info.shape) != 2:
        raise ShapeError(
            f"{scales.shard}: tensor {scales.name} is {scales.dtype} {list(scales.shape)}, "
            f"F32 {list(wanted)} is needed for a weight of {list(info.shape)}. Fetch the shard "
            "again."
        )


def dequantize(
    codes: NDArray[np.uint8], scales: NDArray[np.float32], first_row: int
) -> NDArray[np.uint16]:
    """Return rows of an FP8 weight as the bits of bfloat16.

    Args:
        codes: [rows, in], e4m3.
        scales: [⌈out/128⌉, ⌈in/128⌉] of the whole weight.
        first_row: where in the weight the rows begin.
    """
    out = np.empty(codes.shape, np.uint16)
    _dequantize(codes, scales, first_row, _table(), out)
    return out


@cache
def _table() -> NDArray[np.float32]:
    """Return the value of each e4m3 code (OCP 8-bit floating point, 1.0): bias 7, no infinities."""
    codes = np.arange(256)
    sign = np.where(codes & 0x80, -1.0, 1.0)
    exponent, mantissa = (codes >> 3) & 0xF, codes & 0x7
    values = np.where(
        exponent == 0, mantissa * 2.0**-9, (8 + mantissa) * 2.0 ** (exponent.astype(float) - 10)
    )
    values[(codes & 0x7F) == 0x7F] = np.nan
    return (sign * values).astype(np.float32)


@compiled
def _dequantize(
    codes: Any, scales: Any, first_row: Any, table: Any, out: Any
) -> None:  # pragma: no cover - compiled
    row_values = np.empty(codes.shape[1], np.float32)
    pattern = row_values.view(np.uint32)
    for row in range(codes.shape[0]):
        block_row = (first_row + row) // BLOCK
        for column in range(codes.shape[1]):
            row_values[column] = table[codes[row, column]] * scales[block_row, column // BLOCK]
        for column in range(codes.shape[1]):
            bits = pattern[column]
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            rounded = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)
            # Rounding must not turn a NaN into a number.
            is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
            out[row, column] = np.uint16(0x7FC0) if is_nan else np.uint16(rounded)
