"""Schemes: how a weight is stored, and exactly how many bytes that is.

MLX's affine format, for a weight [..., in] with B bits and groups of g along the last axis:
`weight` u32 [..., in · B / 32], `scales` and `biases` [..., in / g] in the weight's dtype, so
B + 32 / g bits per weight. The mx and nv formats have u8 scales and no biases.
"""

import math
from dataclasses import dataclass

from glm_quant.checkpoint.header import ITEM_SIZE
from glm_quant.model.geometry import Shape
from glm_quant.recipe import Mode, Quantizer


@dataclass(frozen=True)
class Quantized:
    """A weight in groups of codes with shared scales."""

    mode: Mode
    bits: int
    group_size: int
    quantizer: Quantizer = "minmax"

    def config(self) -> dict[str, str | int]:
        """Return the entry of mlx-lm's quantization config."""
        return {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}

    def describe(self) -> str:
        """Return all of it in short, such as "2-bit g64" or "2-bit g64 search"."""
        suffix = "" if self.mode == "affine" else f" {self.mode}"
        suffix += "" if self.quantizer == "minmax" else f" {self.quantizer}"
        return f"{self.bits}-bit g{self.group_size}{suffix}"


@dataclass(frozen=True)
class Stored:
    """A weight kept in a floating dtype (safetensors spelling)."""

    dtype: str

    def describe(self) -> str:
        """Return the short form for tables."""
        return self.dtype.lower()


Scheme = Quantized | Stored


@dataclass(frozen=True)
class TensorLayout:
    """One stored tensor of a weight: name suffix, dtype, shape."""

    suffix: str
    dtype: str
    shape: Shape

    @property
    def row_bytes(self) -> int:
        """Bytes of one row (the last axis)."""
        return math.prod(self.shape[-1:]) * ITEM_SIZE[self.dtype]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * ITEM_SIZE[self.dtype]


def layouts(scheme: Scheme, shape: Shape, source_dtype: str) -> tuple[TensorLayout, ...]:
    """Return the tensors that a weight of `shape` is stored as under `scheme`.

    The suffix "" is the parameter's own name.
    """
    if isinstance(scheme, Stored):
        return (TensorLayout("", scheme.dtype, shape),)
    lead, width = shape[:-1], shape[-1]
    groups = (*lead, width // scheme.group_size)
    codes = TensorLayout("", "U32", (*lead, width * scheme.bits // 32))
    if scheme.mode != "affine":
        return (codes, TensorLayout("scales", "U8", groups))
    return (
        codes,
        TensorLayout("scales", source_dtype, groups),
        TensorLayout("biases", source_dtype, groups),
    )
