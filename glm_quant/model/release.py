"""A release of GLM: held against its config, and what its tensors become in MLX.

A GLM checkpoint can be planned from config and index alone, since the config tells every tensor,
and without mlx-lm, whose import takes seconds: the expressions below are those that the runtime's
`sanitize` leaves (a test compares them). mlx-lm spells a layer's experts as one `switch_mlp` tensor
[n_routed_experts, out, in], and absorbs MLA's `kv_b_proj` [heads · (nope + v), kv_lora_rank] into
`embed_q` [heads, kv_lora_rank, nope], the transposed first rows of each head, and `unembed_out`
[heads, v, kv_lora_rank], the rest.
"""

import math
import re
from collections.abc import Iterator, Mapping

import mlx.core as mx

from glm_quant.architectures.expressions import Expression, source_tensor
from glm_quant.architectures.segments import segments
from glm_quant.architectures.tracing import TRACING_MLX
from glm_quant.architectures.weights import OutputWeight, in_stored_order
from glm_quant.checkpoint.fp8 import BLOCK, FP8_DTYPE, check_scales, scale_name, scaled_weight
from glm_quant.checkpoint.header import ITEM_SIZE, TensorInfo, shorten
from glm_quant.errors import CheckpointError, MissingTensorError, ShapeError
from glm_quant.model.geometry import Geometry
from glm_quant.model.groups import component_group

_EXPERT = re.compile(r"(.*\.mlp)\.experts\.\d+\.(\w+_proj\.weight)")
_KV_B = ".kv_b_proj.weight"
_EXPERT_BIAS = ".e_score_correction_bias"
_MLX_DTYPE = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32, FP8_DTYPE: mx.uint8}


def release_weights(
    geometry: Geometry, weight_map: Mapping[str, str], tensors: Mapping[str, TensorInfo] | None
) -> list[OutputWeight]:
    """Return the weights of the MLX model in the order in which their sources are stored.

    Args:
        geometry: the model's dims.
        weight_map: tensor name to shard, which gives the order.
        tensors: headers, for the stored dtypes; without them BF16 is assumed (the release's).
    """
    if tensors is None:
        tensors = {info.name: info for info in _implied(geometry)}
    arranged: dict[str, Expression | list[Expression]] = {}
    for name, _, _ in geometry.tensors():
        tensor = _dequantized(name, tensors)
        if expert := _EXPERT.fullmatch(name):
            stack = arranged.setdefault(f"{expert[1]}.switch_mlp.{expert[2]}", [])
            if isinstance(stack, list):
                stack.append(tensor)
        elif name.endswith(_KV_B):
            attention = name.removesuffix(_KV_B)
            arranged |= _split_kv_b(attention, tensor, geometry)
        else:
            arranged[name] = tensor
    weights = [
        _output_weight(
            name, value if isinstance(value, Expression) else TRACING_MLX.stack(value), geometry
        )
        for name, value in arranged.items()
    ]
    return in_stored_order(weights, weight_map)


def _output_weight(name: str, expression: Expression, geometry: Geometry) -> OutputWeight:
    group = component_group(name, geometry.num_hidden_layers)
    if group is None:  # pragma: no cover - geometry yields GLM names only
        raise CheckpointError(f"tensor {name} belongs to no component group")
    return OutputWeight(
        name=name,
        expression=expression,
        group=group,
        segments=tuple(segments(expression)),
        quantizable=expression.ndim > 1 and group not in ("norms", "router"),
        keeps_dtype=name.endswith(_EXPERT_BIAS),
    )


def _dequantized(name: str, tensors: Mapping[str, TensorInfo]) -> Expression:
    """Return a tensor of the release; one in FP8 as the BF16 matrix that it stands for."""
    info = tensors[name]
    tensor = source_tensor(name, info.shape, _MLX_DTYPE[info.dtype])
    if info.dtype != FP8_DTYPE:
        return tensor
    scales = tensors[scale_name(name)]
    scale = source_tensor(scales.name, scales.shape, mx.float32)
    scale = TRACING_MLX.repeat(TRACING_MLX.repeat(scale, BLOCK, axis=0), BLOCK, axis=1)
    rows, columns = info.shape
    return (TRACING_MLX.from_fp8(tensor, mx.float32) * scale[:rows, :columns]).astype(mx.bfloat16)


def _split_kv_b(attention: str, kv_b: Expression, geometry: Geometry) -> dict[str, Expression]:
    by_head = kv_b.reshape(geometry.num_attention_heads, -1, geometry.kv_lora_rank)
    keys, values = TRACING_MLX.split(by_head, [geometry.qk_nope_head_dim], axis=1)
    return {
        f"{attention}.embed_q.weight": TRACING_MLX.contiguous(keys.swapaxes(-1, -2)),
        f"{attention}.unembed_out.weight": TRACING_MLX.contiguous(values),
    }


def _implied(geometry: Geometry) -> Iterator[TensorInfo]:
    """Yield the headers that a release of these dims has: BF16 but for the routers' biases."""
    for name, shape, kind in geometry.tensors():
        dtype = "F32" if kind == "F32" else "BF16"
        yield TensorInfo(name, dtype, shape, "", 0, math.prod(shape) * ITEM_SIZE[dtype])


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
    dtypes: dict[str, str] = {}
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
        if expert := _EXPERT.fullmatch(name):
            stack = f"{expert[1]}.switch_mlp.{expert[2]}"
            first = dtypes.setdefault(stack, info.dtype)
            if info.dtype != first:
                raise ShapeError(
                    f"{info.shard}: tensor {name} has dtype {info.dtype}, the other parts of "
                    f"{stack} have {first}. Fetch the shard again."
                )
