"""The plan: every output tensor with its scheme, shard and byte offset, before any weight is read.

Output weights are laid out in the order in which their sources are stored, so the outputs fill one
after the other while the source streams by once, and at most a few are open at any time.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from glm_quant.architectures.architecture import Architecture, open_architecture
from glm_quant.architectures.weights import (
    MTP_REASON,
    OutputWeight,
    drop_reasons,
    output_weights,
)
from glm_quant.checkpoint import fp8
from glm_quant.checkpoint.imatrix import Imatrix, ImatrixRecord
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.scheme import Quantized
from glm_quant.errors import CheckpointError, RecipeError
from glm_quant.model.geometry import Geometry, is_glm
from glm_quant.model.release import check_names, check_shapes, release_weights
from glm_quant.quantize.assignment import assign_schemes
from glm_quant.quantize.layout import PlannedShard, PlannedTensor, PlannedWeight, lay_out
from glm_quant.recipe import ComponentGroup, Defect, Recipe

# A build without any of them cannot be prompted.
_TOKENIZERS = frozenset({"tokenizer.json", "tokenizer.model", "tiktoken.model", "vocab.json"})


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
        geometry: GLM's dims; None for other architectures.
        architecture: what mlx-lm makes of the source; None for GLM, whose runtime travels along.
        dropped: source tensors that no output needs.
        drop_reasons: how many of them for each reason.
        warnings: what a person should know before starting.
        imatrix: what the weights were calibrated with, if they were.
        uncalibrated: the recipe wants a calibration that is still to be made: everything has its
            place, but nothing can be encoded.
        allow: what weights may be: all zero, or equal to each other.
    """

    geometry: Geometry | None
    architecture: Architecture | None
    weights: tuple[PlannedWeight, ...]
    shards: tuple[PlannedShard, ...]
    dropped: tuple[str, ...]
    drop_reasons: Mapping[str, int]
    warnings: tuple[str, ...] = ()
    imatrix: ImatrixRecord | None = None
    uncalibrated: bool = False
    allow: tuple[Defect, ...] = ()

    @property
    def glm_geometry(self) -> Geometry:
        """GLM's dims, for what streams GLM's forward pass.

        Raises:
            CheckpointError: the source is of another architecture.
        """
        if self.geometry is None:
            raise CheckpointError(
                "config.json: model_type is not glm_moe_dsa. Other architectures can be planned, "
                "converted and verified; calibrating, proving and measuring them is not built yet. "
                "Use `glm-quant convert`."
            )
        return self.geometry

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
    weight_map = checkpoint.index.weight_map
    if is_glm(checkpoint.config):
        geometry, architecture = Geometry.from_config(checkpoint.config), None
        weights, warnings = _glm_weights(checkpoint, geometry)
        layers = geometry.num_hidden_layers
    else:
        geometry = None
        architecture = open_architecture(checkpoint.config, checkpoint.tensors.values())
        weights = output_weights(architecture, weight_map)
        layers = architecture.layers
        warnings = _quantized_already(architecture, checkpoint)
    if not checkpoint.files.keys() & _TOKENIZERS:
        warnings.append(
            f"{checkpoint.source.uri}: there is no tokenizer.json, so nobody can prompt the build."
        )
    used = frozenset[str]().union(*(weight.sources for weight in weights))
    dropped = sorted(weight_map.keys() - used)
    reasons = drop_reasons(dropped, layers)
    mtp = [name for name, reason in reasons.items() if reason == MTP_REASON]
    if geometry is None and recipe.own_calibration is not None:
        raise RecipeError(
            f"{recipe.file}: the recipe wants a calibration, which streams GLM's forward pass only "
            "so far. Use the quantizer `search` or `minmax` without `calibration`, or name an "
            "`imatrix`."
        )
    schemes = assign_schemes(weights, mtp, recipe, architecture)
    kept = list(zip(weights, schemes, strict=True))
    planned, shards = lay_out(kept, recipe.shard_bytes)
    opened = _open_imatrix(recipe, imatrix)
    return Plan(
        geometry,
        architecture,
        planned if opened is None else calibrated(planned, recipe, opened),
        shards,
        tuple(dropped),
        Counter(reasons.values()),
        tuple(warnings),
        opened and opened.record,
        uncalibrated=opened is None and recipe.own_calibration is not None,
        allow=recipe.allow,
    )


def _open_imatrix(recipe: Recipe, calibrated_folder: Path | None) -> Imatrix | None:
    # A recipe that names an imatrix wants no calibration of its own.
    named = Path(recipe.imatrix).expanduser() if recipe.imatrix is not None else None
    folder = named or calibrated_folder
    return Imatrix.open(folder) if folder is not None else None


def _glm_weights(
    checkpoint: Checkpoint, geometry: Geometry
) -> tuple[list[OutputWeight], list[str]]:
    """Return the weights of a GLM release, held against its config, and warnings."""
    weight_map = checkpoint.index.weight_map
    is_fp8 = fp8.check_fp8_config(checkpoint.config)
    check_names(geometry, weight_map, fp8=is_fp8)
    # Config and index are enough for a plan: weights may still be remote.
    tensors = checkpoint.tensors if checkpoint.has_weights else None
    if tensors is not None:
        check_shapes(geometry, tensors, fp8=is_fp8)
    return release_weights(geometry, weight_map, tensors), [fp8.WARNING] if is_fp8 else []


def _quantized_already(architecture: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Return what a person should know of a source that is quantized already."""
    if "quantization" in checkpoint.config:
        raise CheckpointError(
            "config.json: `quantization` says that this checkpoint was quantized for MLX already. "
            "Use the vendor's release as the source."
        )
    warnings: list[str] = []
    if any(info.dtype.startswith("F8") for info in checkpoint.tensors.values()):
        warnings.append(fp8.WARNING)
    if packed := architecture.packed:
        kinds = sorted({f"{scheme['bits']}-bit {scheme['mode']}" for scheme in packed.values()})
        warnings.append(
            f"{len(packed):,} modules of the source are packed already ({', '.join(kinds)}). They "
            "pass as they are, whatever the recipe says of them."
        )
    return warnings


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
