"""The plan: every output tensor with its scheme, shard and byte offset, before any weight is read.

Output weights are laid out in the order in which their sources are stored, so the outputs fill one
after the other while the source streams by once, and at most a few are open at any time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from glm_quant.checkpoint import fp8
from glm_quant.checkpoint.imatrix import Imatrix, ImatrixRecord
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.scheme import Quantized, Scheme, Stored
from glm_quant.errors import RecipeError
from glm_quant.model.geometry import Geometry
from glm_quant.model.groups import component_group
from glm_quant.model.restructure import (
    OutputWeight,
    check_names,
    check_shapes,
    output_weights,
)
from glm_quant.quantize.layout import PlannedShard, PlannedTensor, PlannedWeight, lay_out
from glm_quant.recipe import ComponentGroup, Recipe, Rule

_STORED_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


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
    if "tokenizer.json" not in checkpoint.files:
        warnings += (
            f"{checkpoint.source.uri}: there is no tokenizer.json, so nobody can prompt the build.",
        )
    check_names(geometry, checkpoint.index.weight_map, fp8=is_fp8)
    # Config and index are enough for a plan: weights may still be remote.
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
    planned, shards = lay_out(kept, recipe.shard_bytes)
    opened = _open_imatrix(recipe, imatrix)
    return Plan(
        geometry,
        planned if opened is None else calibrated(planned, recipe, opened),
        shards,
        tuple(sorted(dropped)),
        warnings,
        opened and opened.record,
        uncalibrated=opened is None and recipe.own_calibration is not None,
    )


def _open_imatrix(recipe: Recipe, calibrated_folder: Path | None) -> Imatrix | None:
    # A recipe that names an imatrix wants no calibration of its own.
    named = Path(recipe.imatrix).expanduser() if recipe.imatrix is not None else None
    folder = named or calibrated_folder
    return Imatrix.open(folder) if folder is not None else None


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
    weights: Sequence[PlannedWeight], recipe: Recipe, imatrix: Imatrix
) -> tuple[PlannedWeight, ...]:
    """Give searched weights their importance and `gptq` its factors.

    What no calibration reaches goes without: `gptq` without a factor is `search`.
    """
    calibrated_weights: list[PlannedWeight] = []
    if recipe.wants_factors and not imatrix.has_factors:
        raise RecipeError(
            f"{recipe.file}: imatrix {imatrix.folder} has importance alone, and the quantizer "
            "`gptq` needs factors. Make it again with `glm-quant calibrate --factors`, or use "
            "`search`."
        )
    for planned in weights:
        importance, factor = None, None
        if isinstance(planned.scheme, Quantized) and planned.scheme.quantizer != "minmax":
            importance = imatrix.importance(planned.weight.path)
            if planned.scheme.quantizer == "gptq":
                factor = imatrix.factor(planned.weight.path)
        if importance and importance.shape() != (importance.units, planned.weight.shape[-1]):
            raise RecipeError(
                f"{recipe.file}: imatrix {imatrix.folder} has importance "
                f"{list(importance.shape())} for {planned.weight.path}, whose shape is "
                f"{list(planned.weight.shape)}. It was made from another model; calibrate this one."
            )
        calibrated_weights.append(replace(planned, importance=importance, factor=factor))
    return tuple(calibrated_weights)
