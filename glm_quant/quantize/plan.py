"""The plan: every output tensor with its scheme, shard and byte offset, before any weight is read.

Output weights are laid out in the order in which their sources are stored, so the outputs fill one
after the other while the source streams by once, and at most a few are open at any time.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from glm_quant.checkpoint import fp8
from glm_quant.checkpoint.header import ITEM_SIZE
from glm_quant.checkpoint.imatrix import Factor, Imatrix, ImatrixRecord, Importance
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.scheme import Quantized, Scheme, Stored, TensorLayout, layouts
from glm_quant.errors import RecipeError
from glm_quant.model.geometry import Geometry
from glm_quant.model.groups import component_group
from glm_quant.model.restructure import (
    OutputWeight,
    check_names,
    check_shapes,
    output_weights,
)
from glm_quant.recipe import ComponentGroup, Recipe, Rule

_STORED_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of an output shard; `offset` is absolute in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: int
    offset: int
    row_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class PlannedWeight:
    """An output weight with its scheme and the tensors it is stored as."""

    weight: OutputWeight
    scheme: Scheme
    tensors: tuple[PlannedTensor, ...]
    importance: Importance | None = None
    factor: Factor | None = None

    def describe(self) -> str:
        """Return everything but the source that decides its bytes."""
        return self.scheme.describe() + self.calibrated

    @property
    def calibrated(self) -> str:
        """What of a calibration decides its bytes."""
        imatrix = f", imatrix {self.importance.sha256}" if self.importance else ""
        return imatrix + (f", factor {self.factor.sha256}" if self.factor else "")

    @property
    def size_bytes(self) -> int:
        """Bytes of all its tensors."""
        return sum(tensor.size_bytes for tensor in self.tensors)


@dataclass(frozen=True)
class PlannedShard:
    """One output file: its name, its header and what it holds."""

    name: str
    header: bytes
    tensors: tuple[PlannedTensor, ...]

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return len(self.header) + sum(tensor.size_bytes for tensor in self.tensors)


class GroupTotals(BaseModel):
    """What a component group comes to under a plan.

    Attributes:
        schemes: parameters by scheme, most first; nearly always one scheme.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    group: ComponentGroup
    params: int
    size_bytes: int
    schemes: dict[str, int]


@dataclass(frozen=True)
class Plan:
    """What will be made from a checkpoint under a recipe.

    Attributes:
        dropped: source tensors that no output needs.
        warnings: what a person should know before starting.
        imatrix: what the weights were calibrated with, if they were.
        uncalibrated: the recipe wants a calibration that is still to be made: everything has its
            place, but nothing can be encoded.
    """

    geometry: Geometry
    weights: tuple[PlannedWeight, ...]
    shards: tuple[PlannedShard, ...]
    dropped: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    imatrix: ImatrixRecord | None = None
    uncalibrated: bool = False

    @property
    def tensors(self) -> Iterator[PlannedTensor]:
        """All output tensors, shard by shard."""
        return (tensor for shard in self.shards for tensor in shard.tensors)

    @property
    def params(self) -> int:
        """Parameters of the build."""
        return sum(planned.weight.params for planned in self.weights)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of tensors, without headers: the index's total_size."""
        return sum(planned.size_bytes for planned in self.weights)

    @property
    def bits_per_weight(self) -> float:
        """Bits of tensors per parameter, as mlx-lm's compute_bits_per_weight counts."""
        return self.tensor_bytes * 8 / self.params

    def groups(self) -> list[GroupTotals]:
        """Return the totals of each component group, largest first."""
        members: dict[ComponentGroup, list[PlannedWeight]] = defaultdict(list)
        for planned in self.weights:
            members[planned.weight.group].append(planned)
        totals: list[GroupTotals] = []
        for group, weights in members.items():
            schemes = Counter[str]()
            for planned in weights:
                schemes[planned.scheme.describe()] += planned.weight.params
            totals.append(
                GroupTotals(
                    group=group,
                    params=sum(planned.weight.params for planned in weights),
                    size_bytes=sum(planned.size_bytes for planned in weights),
                    schemes=dict(schemes.most_common()),
                )
            )
        return sorted(totals, key=lambda total: -total.size_bytes)


def make_plan(checkpoint: Checkpoint, recipe: Recipe, imatrix: Path | None = None) -> Plan:
    """Plan a conversion. Reads the config, the index and (where there are weights) the headers.

    Args:
        checkpoint: the source.
        recipe: what to make.
        imatrix: folder of the recipe's own calibration, where it wants one and has it.

    Raises:
        CheckpointError: the checkpoint is not whole or not what its config implies.
        RecipeError: a weight without a rule, a rule without a weight, a scheme that does not fit.
    """
    geometry = Geometry.from_config(checkpoint.config)
    is_fp8 = fp8.check_fp8_config(checkpoint.config)
    warnings = (fp8.WARNING,) if is_fp8 else ()
    check_names(geometry, checkpoint.index.weight_map, fp8=is_fp8)
    tensors = checkpoint.tensors if checkpoint.has_weights else None
    if tensors is not None:
        check_shapes(geometry, tensors, fp8=is_fp8)
    weights = output_weights(geometry, checkpoint.index.weight_map, tensors)
    dropped = [
        name
        for name in checkpoint.index.weight_map
        if component_group(name, geometry.num_hidden_layers) == "mtp"
    ]
    schemes = _assign(weights, dropped, recipe)
    kept = [(weight, scheme) for weight, scheme in zip(weights, schemes, strict=True) if scheme]
    planned, shards = _lay_out(kept, recipe.shard_bytes)
    if recipe.imatrix is not None:
        imatrix = Path(recipe.imatrix).expanduser()
    opened = Imatrix.open(imatrix) if imatrix is not None else None
    return Plan(
        geometry,
        planned if opened is None else calibrated(planned, recipe, opened),
        shards,
        tuple(sorted(dropped)),
        warnings,
        opened and opened.record,
        uncalibrated=opened is None and recipe.own_calibration is not None,
    )


def _assign(weights: list[OutputWeight], mtp: list[str], recipe: Recipe) -> list[Scheme | None]:
    """Give each weight the scheme of the first rule that matches it."""
    fired: set[int] = set()

    def first_rule(path: str, group: str, name: str) -> Rule:
        for i, rule in enumerate(recipe.rules):
            if rule.matches(path, group):  # pyright: ignore[reportArgumentType]
                fired.add(i)
                return rule
        raise RecipeError(
            f"{recipe.file}: no rule covers tensor {name} (group {group}). Add a rule for the "
            "group, for example `dtype: source`."
        )

    schemes = [
        _scheme(first_rule(weight.path, weight.group, weight.name), weight, recipe)
        for weight in weights
    ]
    for name in mtp:
        rule = first_rule(name.rpartition(".")[0], "mtp", name)
        if not rule.drop:
            raise RecipeError(
                f"{recipe.where(rule)}: the rule keeps tensor {name}, but stock mlx-lm has no "
                "multi-token prediction and drops such layers. Add `- group: mtp` with "
                "`drop: true` before it."
            )
    for i, rule in enumerate(recipe.rules):
        # A checkpoint without MTP layers is no reason to write another recipe.
        if i not in fired and rule.group != "mtp":
            raise RecipeError(
                f"{recipe.where(rule)}: the rule ({rule.describe()}) matches none of the "
                f"{len(weights):,} weights. Correct it, or remove it if an earlier rule covers it."
            )
    return schemes


def _scheme(rule: Rule, weight: OutputWeight, recipe: Recipe) -> Scheme | None:
    if rule.drop:
        raise RecipeError(
            f"{recipe.where(rule)}: the rule drops tensor {weight.name}, which the model cannot "
            "run without. Only `group: mtp` can be dropped."
        )
    if rule.bits is None:
        dtype = _STORED_DTYPE.get(rule.dtype or "source", weight.source_dtype)
        return Stored(weight.source_dtype if weight.keeps_dtype else dtype)
    if not weight.is_matrix:
        raise RecipeError(
            f"{recipe.where(rule)}: the rule quantizes tensor {weight.name} (group {weight.group}, "
            f"shape {list(weight.shape)}), which mlx-lm cannot run quantized. Give it a `dtype`."
        )
    width = weight.shape[-1]
    if width % rule.group_size:
        raise RecipeError(
            f"{recipe.where(rule)}: group_size {rule.group_size} does not divide the last dim "
            f"{width} of tensor {weight.name}. Choose one of "
            f"{', '.join(str(g) for g in (32, 64, 128) if width % g == 0) or 'another dtype'}."
        )
    quantizer = rule.quantizer or recipe.quantizer if rule.mode == "affine" else "minmax"
    return Quantized(rule.mode, rule.bits, rule.group_size, quantizer)


def calibrated(
    planned: Sequence[PlannedWeight], recipe: Recipe, imatrix: Imatrix
) -> tuple[PlannedWeight, ...]:
    """Give searched weights their importance and `gptq` its factors.

    What no calibration reaches goes without: `gptq` without a factor is `search`.
    """
    made: list[PlannedWeight] = []
    if recipe.wants_factors and not imatrix.has_factors:
        raise RecipeError(
            f"{recipe.file}: imatrix {imatrix.folder} has importance alone, and the quantizer "
            "`gptq` needs factors. Make it again with `glm-quant calibrate --factors`, or use "
            "`search`."
        )
    for one in planned:
        importance, factor = None, None
        if isinstance(one.scheme, Quantized) and one.scheme.quantizer != "minmax":
            importance = imatrix.importance(one.weight.path)
            if one.scheme.quantizer == "gptq":
                factor = imatrix.factor(one.weight.path)
        if importance and importance.shape() != (importance.units, one.weight.shape[-1]):
            raise RecipeError(
                f"{recipe.file}: imatrix {imatrix.folder} has importance "
                f"{list(importance.shape())} for {one.weight.path}, whose shape is "
                f"{list(one.weight.shape)}. It was made from another model; calibrate this one."
            )
        made.append(replace(one, importance=importance, factor=factor))
    return tuple(made)


def _lay_out(
    kept: list[tuple[OutputWeight, Scheme]], shard_bytes: int
) -> tuple[tuple[PlannedWeight, ...], tuple[PlannedShard, ...]]:
    """Pack tensors greedily into shards and fix every byte offset."""
    stored = [
        (weight, layout, tensor_name(weight, layout))
        for weight, scheme in kept
        for layout in layouts(scheme, weight.shape, weight.source_dtype)
    ]
    packs: list[list[tuple[OutputWeight, TensorLayout, str]]] = []
    filled = 0
    for entry in stored:
        size = entry[1].size_bytes
        if not packs or filled + size > shard_bytes:
            packs.append([])
            filled = 0
        packs[-1].append(entry)
        filled += size
    placed: dict[str, PlannedTensor] = {}
    shards: list[PlannedShard] = []
    for i, pack in enumerate(packs):
        name = (
            f"model-{i + 1:05d}-of-{len(packs):05d}.safetensors"
            if len(packs) > 1
            else "model.safetensors"
        )
        shard = _shard(name, i, [(layout, tensor) for _, layout, tensor in pack])
        shards.append(shard)
        placed |= {tensor.name: tensor for tensor in shard.tensors}
    planned = tuple(
        PlannedWeight(
            weight,
            scheme,
            tuple(
                placed[tensor_name(weight, layout)]
                for layout in layouts(scheme, weight.shape, weight.source_dtype)
            ),
        )
        for weight, scheme in kept
    )
    return planned, tuple(shards)


def _shard(name: str, number: int, entries: list[tuple[TensorLayout, str]]) -> PlannedShard:
    """Fix the header and the offsets of one file.

    Wide dtypes come first and names are sorted, as safetensors' own writer does, so that every
    tensor is aligned to its item size.
    """
    ordered = sorted(entries, key=lambda entry: (-ITEM_SIZE[entry[0].dtype], entry[1]))
    header: dict[str, object] = {"__metadata__": {"format": "mlx"}}
    begin = 0
    for layout, tensor in ordered:
        end = begin + layout.size_bytes
        header[tensor] = {
            "dtype": layout.dtype,
            "shape": list(layout.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    tensors: list[PlannedTensor] = []
    offset = len(head)
    for layout, tensor in ordered:
        tensors.append(
            PlannedTensor(
                tensor,
                layout.dtype,
                layout.shape,
                number,
                offset,
                layout.row_bytes,
                layout.size_bytes,
            )
        )
        offset += layout.size_bytes
    return PlannedShard(name, head, tuple(tensors))


def tensor_name(weight: OutputWeight, layout: TensorLayout) -> str:
    """Return the name under which one stored tensor of a weight stands in its shard."""
    return f"{weight.path}.{layout.suffix}" if layout.suffix else weight.name
