"""The weights of an output: what a checkpoint's tensors become, before anything has a scheme."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from glm_quant.architectures.architecture import STORED_DTYPE, Architecture, Parameter
from glm_quant.architectures.expressions import Expression
from glm_quant.architectures.segments import Segment, segments
from glm_quant.recipe import ComponentGroup

MTP_REASON = "multi-token prediction"
# Parts of a checkpoint that mlx-lm's language models have no use for, by a word of their names.
_REASONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (MTP_REASON, ("mtp", "nextn")),
    ("vision", ("visual", "vision", "image", "multi_modal", "mm_projector", "patch")),
    ("audio", ("audio", "speech")),
    ("rotary tables", ("rotary", "inv_freq", "freqs_cis")),
)


@dataclass(frozen=True, eq=False)
class OutputWeight:
    """One weight of the MLX model, before it gets a scheme.

    Attributes:
        name: parameter name, such as `model.layers.3.mlp.switch_mlp.gate_proj.weight`.
        expression: how it is computed from the source.
        group: its component group.
        segments: in row order; together they fill every row once.
        quantizable: whether mlx-lm has a quantized form of its module.
        keeps_dtype: whether no rule may cast it: a router's F32 bias decides ties between experts.
    """

    name: str
    expression: Expression
    group: ComponentGroup
    segments: tuple[Segment, ...]
    quantizable: bool
    keeps_dtype: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Unquantized shape."""
        return self.expression.shape

    @property
    def source_dtype(self) -> str:
        """Dtype without a scheme, as safetensors spells it; BF16 for weights in FP8."""
        return STORED_DTYPE[self.expression.dtype]

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

    @cached_property
    def sources(self) -> frozenset[str]:
        """The names of all source tensors that it is made of."""
        return frozenset(
            str(leaf.name) for segment in self.segments for leaf in segment.source_tensors
        )


def output_weights(architecture: Architecture, weight_map: Mapping[str, str]) -> list[OutputWeight]:
    """Return the weights of an architecture in the order in which their sources are stored.

    Args:
        architecture: what mlx-lm makes of the checkpoint.
        weight_map: source tensor to shard, which gives the order.
    """
    casts: Callable[[str], bool] = getattr(architecture.model, "cast_predicate", lambda _: True)
    weights = [_weight(parameter, casts(parameter.name)) for parameter in architecture.parameters]
    return in_stored_order(weights, weight_map)


def in_stored_order(
    weights: Iterable[OutputWeight], weight_map: Mapping[str, str]
) -> list[OutputWeight]:
    """Return weights in the order in which their sources are stored."""

    def position(weight: OutputWeight) -> tuple[str, str]:
        places = [(weight_map.get(s.source, ""), s.source) for s in weight.segments]
        return min(places, default=("", ""))

    return sorted(weights, key=position)


def _weight(parameter: Parameter, may_be_cast: bool) -> OutputWeight:
    return OutputWeight(
        name=parameter.name,
        expression=parameter.expression,
        group=parameter.group,
        segments=tuple(segments(parameter.expression)),
        quantizable=parameter.quantizable,
        keeps_dtype=not may_be_cast,
    )


def drop_reasons(names: Sequence[str], layers: int) -> dict[str, str]:
    """Return why each of some source tensors is dropped.

    Args:
        names: of the dropped tensors.
        layers: how many layers the model has; what stands past them predicts further tokens.
    """
    return {name: _reason(name, layers) for name in names}


def _reason(name: str, layers: int) -> str:
    parts = name.split(".")
    for before, number in pairwise(parts):
        if before == "layers" and number.isdigit() and int(number) >= layers:
            return MTP_REASON
    for reason, words in _REASONS:
        if any(word in name.lower() for word in words):
            return reason
    return "not used by mlx-lm"
