"""What GLM's release tensors become in MLX: experts stacked, `kv_b_proj` split.

mlx-lm spells a layer's experts as one `switch_mlp` tensor [n_routed_experts, out, in], and absorbs
MLA's `kv_b_proj` [heads · (nope + v), kv_lora_rank] into two per-head matrices: `embed_q`
[heads, kv_lora_rank, nope], the transposed first rows of each head, and `unembed_out`
[heads, v, kv_lora_rank], the rest. Quantization groups run along the last axis, so `embed_q`'s lie
across what were rows of `kv_b_proj`: splitting comes before quantizing and the order matters.

Every output is seen as a matrix of rows × last dim. A part of it comes from one source tensor and
fills whole rows, so each part can be quantized and written on its own.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from glm_quant.checkpoint.fp8 import FP8_DTYPE, check_scales, scaled_weight
from glm_quant.checkpoint.header import TensorInfo, shorten
from glm_quant.errors import CheckpointError, MissingTensorError, ShapeError
from glm_quant.model.geometry import Geometry, Shape
from glm_quant.model.groups import component_group
from glm_quant.recipe import ComponentGroup

B = TypeVar("B", bound=np.generic)
Transform = Literal["copy", "embed_q", "unembed_out"]

_EXPERT = re.compile(r"(.*\.mlp)\.experts\.(\d+)\.(\w+_proj\.weight)")
_KV_B = ".kv_b_proj.weight"
_EXPERT_BIAS = ".e_score_correction_bias"


@dataclass(frozen=True)
class Part:
    """One source tensor's share of an output weight.

    Attributes:
        source: name of the source tensor.
        transform: what happens to its rows.
        first_row: first row of the output that it fills.
        unit: (source rows, output rows) of the smallest block that can be converted alone: a row,
            or for `kv_b_proj` a head.
        units: how many such blocks there are.
    """

    source: str
    transform: Transform
    first_row: int
    unit: tuple[int, int]
    units: int


@dataclass
class OutputWeight:
    """One weight of the MLX model, before it gets a scheme.

    Attributes:
        name: parameter name, such as `model.layers.3.mlp.switch_mlp.gate_proj.weight`.
        shape: unquantized shape.
        source_dtype: dtype in the source, as safetensors spells it; BF16 for FP8 weights, which
            are read as such.
        parts: in row order; together they fill every row once.
    """

    name: str
    shape: Shape
    source_dtype: str
    group: ComponentGroup
    parts: list[Part] = field(default_factory=list[Part])

    @property
    def path(self) -> str:
        """The module path, as mlx-lm's quantization config spells it."""
        return self.name.rpartition(".")[0]

    @property
    def params(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def rows(self) -> int:
        """Rows, when seen as a matrix of rows × last dim."""
        return math.prod(self.shape[:-1])

    @property
    def is_matrix(self) -> bool:
        """Whether mlx-lm has a quantized form of its module: not for norms and the router."""
        return len(self.shape) > 1 and self.group not in ("norms", "router")

    @property
    def keeps_dtype(self) -> bool:
        """Whether no rule may cast it: the router's F32 bias decides ties between experts."""
        return self.name.endswith(_EXPERT_BIAS)


def check_names(geometry: Geometry, weight_map: Mapping[str, str], *, fp8: bool = False) -> None:
    """Compare the index's names with what the config implies.

    Args:
        geometry: the model's dims.
        weight_map: the index.
        fp8: whether weights may have scales.

    Raises:
        MissingTensorError: the config implies a tensor that the index does not name.
        CheckpointError: the index names a tensor that no GLM of this config has.
    """
    expected = dict.fromkeys(name for name, _, _ in geometry.tensors())
    for name in expected:
        if name not in weight_map:
            raise MissingTensorError(
                f"model.safetensors.index.json: tensor {name} is missing, although config.json "
                f"implies it ({len(expected):,} tensors expected without MTP, "
                f"{len(expected.keys() & weight_map.keys()):,} found). Fetch index and config "
                "again."
            )
    for name in weight_map:
        weight = (scaled_weight(name) if fp8 else None) or name
        if weight not in expected and (
            component_group(name, geometry.num_hidden_layers) != "mtp"
            or geometry.num_nextn_predict_layers == 0
        ):
            raise CheckpointError(
                f"model.safetensors.index.json: tensor {shorten(name)} is none that config.json "
                f"implies (num_hidden_layers is {geometry.num_hidden_layers}). Index and config "
                "are of different models, or this architecture is newer than this converter."
            )


def check_shapes(
    geometry: Geometry, tensors: Mapping[str, TensorInfo], *, fp8: bool = False
) -> None:
    """Compare the headers with what the config implies.

    Args:
        geometry: the model's dims.
        tensors: the headers.
        fp8: whether matrices may be FP8, with scales.

    Raises:
        ShapeError: shape or dtype differ.
    """
    for name, shape, kind in geometry.tensors():
        info = tensors[name]
        if info.shape != shape:
            raise ShapeError(
                f"{info.shard}: tensor {name} has shape {list(info.shape)}, config.json implies "
                f"{list(shape)}. Config and weights are of different models; fetch both again."
            )
        allowed = ("F32",) if kind == "F32" else ("BF16", "F16", "F32")
        if fp8 and kind != "F32":
            allowed += (FP8_DTYPE,)
        if info.dtype not in allowed:
            raise ShapeError(
                f"{info.shard}: tensor {name} has dtype {info.dtype}, {' or '.join(allowed)} is "
                "needed. Use the BF16 release as the source."
            )
        if info.dtype == FP8_DTYPE:
            check_scales(info, tensors)


def output_weights(
    geometry: Geometry, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo] | None
) -> list[OutputWeight]:
    """Return the weights of the MLX model in the order in which their sources are stored.

    Args:
        geometry: the model's dims.
        weight_map: tensor name to shard, which gives the order.
        tensors: headers, for the stored dtypes; without them BF16 is assumed (the release's).
    """
    outputs: dict[str, OutputWeight] = {}
    for name, shape, kind in geometry.tensors():
        dtype = tensors[name].dtype if tensors else ("F32" if kind == "F32" else "BF16")
        dtype = "BF16" if dtype == FP8_DTYPE else dtype
        for output_name, output_shape, part in _destinations(name, shape, geometry):
            group = component_group(output_name, geometry.num_hidden_layers)
            if group is None:  # pragma: no cover - geometry yields GLM names only
                raise CheckpointError(f"tensor {name} belongs to no component group")
            output = outputs.setdefault(
                output_name, OutputWeight(output_name, output_shape, dtype, group)
            )
            if output.source_dtype != dtype:
                raise ShapeError(
                    f"{weight_map[name]}: tensor {name} has dtype {dtype}, the other parts of "
                    f"{output_name} have {output.source_dtype}. Fetch the shard again."
                )
            output.parts.append(part)

    def position(output: OutputWeight) -> tuple[str, str]:
        return min((weight_map[part.source], part.source) for part in output.parts)

    return sorted(outputs.values(), key=position)


def _destinations(name: str, shape: Shape, geometry: Geometry) -> Iterator[tuple[str, Shape, Part]]:
    """Yield (output name, whole output shape, part) for each output that a source tensor feeds."""
    expert = _EXPERT.fullmatch(name)
    if expert:
        mlp, number, projection = expert.groups()
        output = f"{mlp}.switch_mlp.{projection}"
        part = Part(name, "copy", int(number) * shape[0], (1, 1), shape[0])
        yield output, (geometry.n_routed_experts, *shape), part
    elif name.endswith(_KV_B):
        attention = name.removesuffix(_KV_B)
        heads, rank = geometry.num_attention_heads, geometry.kv_lora_rank
        nope, v = geometry.qk_nope_head_dim, geometry.v_head_dim
        embed_q = Part(name, "embed_q", 0, (nope + v, rank), heads)
        unembed_out = Part(name, "unembed_out", 0, (nope + v, v), heads)
        yield f"{attention}.embed_q.weight", (heads, rank, nope), embed_q
        yield f"{attention}.unembed_out.weight", (heads, v, rank), unembed_out
    else:
        rows = math.prod(shape[:-1])
        yield name, shape, Part(name, "copy", 0, (1, 1), rows)


def transform_rows(block: NDArray[B], transform: Transform, geometry: Geometry) -> NDArray[B]:
    """Turn a block of a source tensor into rows of an output.

    Args:
        block: [source rows, source last dim], whole units, in any dtype: nothing is computed.
        transform: which output it is for.
        geometry: the model's dims.

    Returns:
        [output rows, output last dim], contiguous.
    """
    if transform == "copy":
        return block
    nope, v, rank = geometry.qk_nope_head_dim, geometry.v_head_dim, geometry.kv_lora_rank
    heads = block.reshape(-1, nope + v, rank)
    if transform == "embed_q":
        return np.ascontiguousarray(heads[:, :nope].swapaxes(-1, -2)).reshape(-1, nope)
    return np.ascontiguousarray(heads[:, nope:]).reshape(-1, rank)
