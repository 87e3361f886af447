"""What is fitted: parts of the model, each to be stored one way, and the rules that say so.

A part is a component group, or the routed experts' gate and up or down projections, in a band of
layers. Fitted are the weights that rules by `group` quantize in the recipe to begin with; its rules
by `match`, and groups that it keeps in a dtype, stay as they are.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, pairwise

from glm_quant.codes.scheme import Quantized, layouts
from glm_quant.errors import RecipeError
from glm_quant.model.groups import layer_of
from glm_quant.quantize.layout import PlannedWeight
from glm_quant.quantize.plan import Plan
from glm_quant.recipe import ComponentGroup, Quantizer, Recipe, Rule

# (bits, group size) that a part may get; what does not divide its weights is left out.
LADDER = ((2, 128), (2, 64), (2, 32), (3, 128), (3, 64), (4, 64), (5, 64), (6, 64), (8, 64))

_DOWN = r"\.switch_mlp\.down_proj$"
_GATE_UP = r"\.switch_mlp\.(gate|up)_proj$"


@dataclass(frozen=True)
class Kind:
    """Weights that belong together in every layer: a group, or what a pattern selects of it."""

    group: ComponentGroup
    match: str | None = None

    @property
    def title(self) -> str:
        """What a table calls it."""
        projections = {_DOWN: " down", _GATE_UP: " gate, up", None: ""}
        return f"{self.group}{projections[self.match]}"


@dataclass(frozen=True)
class Part:
    """Weights that get one scheme.

    Attributes:
        layers: first and last; None for embeddings and head.
        schemes: what it may get, smallest first.
    """

    kind: Kind
    layers: tuple[int, int] | None
    weights: tuple[PlannedWeight, ...]
    schemes: tuple[Quantized, ...]

    @property
    def title(self) -> str:
        """What a table calls it."""
        where = f" {self.layers[0]}-{self.layers[1]}" if self.layers else ""
        return f"{self.kind.title}{where}"

    def size_bytes(self, scheme: Quantized) -> int:
        """Return the bytes of all tensors of its weights under a scheme."""
        return sum(
            layout.size_bytes
            for planned in self.weights
            for layout in layouts(scheme, planned.weight.shape, planned.weight.source_dtype)
        )

    def under(self, scheme: Quantized) -> dict[str, PlannedWeight]:
        """Return its weights by path, each with another scheme."""
        return {one.weight.path: replace(one, scheme=scheme) for one in self.weights}


def divide(
    plan: Plan, recipe: Recipe, bands: int, floors: Mapping[ComponentGroup, int]
) -> list[Part]:
    """Divide what a recipe quantizes by group into parts.

    Args:
        plan: of the recipe.
        recipe: to begin with.
        bands: parts that the layers of a kind are cut into.
        floors: the least bits of a group.

    Raises:
        RecipeError: nothing is to be fitted, a floor is for a group that is not, or no scheme of
            the ladder fits a part.
    """
    members: dict[Kind, list[PlannedWeight]] = defaultdict(list)
    for planned in plan.weights:
        if _is_fitted(_rule_of(planned, recipe)):
            members[_kind(planned)].append(planned)
    unknown = sorted(set(floors) - {kind.group for kind in members})
    if unknown or not members:
        known = ", ".join(sorted({kind.group for kind in members})) or "no group"
        raise RecipeError(
            f"{recipe.file}: its rules by group quantize {known}"
            + (f", so --floor {unknown[0]} has nothing to hold." if unknown else ".")
            + " Give `group` and `bits` to what is to be fitted."
        )
    return [
        Part(kind, layers, tuple(weights), _schemes(kind, weights, floors.get(kind.group, 0)))
        for kind, every in members.items()
        for layers, weights in _banded(every, bands)
    ]


def fitted_rules(recipe: Recipe, parts: Sequence[Part], schemes: Sequence[Quantized]) -> list[Rule]:
    """Return the rules of a recipe in which each part has a scheme.

    Neighbouring bands with the same scheme become one rule, and a kind that is the same everywhere
    one without layers.
    """
    chosen = dict[Kind, list[tuple[Part, Quantized]]]()
    for part, scheme in zip(parts, schemes, strict=True):
        chosen.setdefault(part.kind, []).append((part, scheme))
    down, gate_up = Kind("routed_experts", _DOWN), Kind("routed_experts", _GATE_UP)
    if chosen.get(down) and [s for _, s in chosen[down]] == [s for _, s in chosen[gate_up]]:
        experts = Kind("routed_experts")
        chosen[experts] = [(replace(p, kind=experts), s) for p, s in chosen.pop(down)]
        del chosen[gate_up]
    rules: list[Rule] = []
    for rule in recipe.rules:
        if not _is_fitted(rule):
            rules.append(rule)
            continue
        groups = rule.group if isinstance(rule.group, tuple) else (rule.group,)
        for kind in [kind for kind in chosen if kind.group in groups]:
            rules += _rules_of(kind, chosen.pop(kind))
    return rules


def _rules_of(kind: Kind, choices: list[tuple[Part, Quantized]]) -> list[Rule]:
    runs = [
        (scheme, [part for part, _ in run])
        for scheme, run in groupby(choices, key=lambda choice: choice[1])
    ]
    rules: list[Rule] = []
    for scheme, parts in runs:
        first, last = parts[0].layers, parts[-1].layers
        layers = (first[0], last[1]) if len(runs) > 1 and first and last else None
        rules.append(
            Rule(
                group=None if kind.match else kind.group,
                match=kind.match,
                layers=layers,
                bits=scheme.bits,
                group_size=scheme.group_size,
                quantizer=scheme.quantizer,
            )
        )
    return rules


def _is_fitted(rule: Rule) -> bool:
    return rule.bits is not None and rule.match is None and rule.mode == "affine"


def _rule_of(planned: PlannedWeight, recipe: Recipe) -> Rule:
    weight = planned.weight
    return next(rule for rule in recipe.rules if rule.matches(weight.path, weight.group))


def _kind(planned: PlannedWeight) -> Kind:
    weight = planned.weight
    if weight.group != "routed_experts":
        return Kind(weight.group)
    return Kind(weight.group, _DOWN if weight.path.endswith("down_proj") else _GATE_UP)


def _banded(
    weights: list[PlannedWeight], bands: int
) -> list[tuple[tuple[int, int] | None, list[PlannedWeight]]]:
    """Cut weights into bands of layers; neighbouring bands have nearly as many layers."""
    by_layer: dict[int | None, list[PlannedWeight]] = defaultdict(list)
    for planned in weights:
        by_layer[layer_of(planned.weight.name)].append(planned)
    layers = sorted(layer for layer in by_layer if layer is not None)
    if not layers:
        return [(None, weights)]
    count = min(bands, len(layers))
    cuts = [i * len(layers) // count for i in range(count + 1)]
    return [
        ((layers[a], layers[b - 1]), [one for layer in layers[a:b] for one in by_layer[layer]])
        for a, b in pairwise(cuts)
    ]


def _best(quantizers: set[Quantizer]) -> Quantizer:
    """Return the one that does most: what a part has in some layers it gets in all."""
    if "gptq" in quantizers:
        return "gptq"
    return "search" if "search" in quantizers else "minmax"


def _schemes(
    kind: Kind, weights: Sequence[PlannedWeight], least_bits: int
) -> tuple[Quantized, ...]:
    quantizers: set[Quantizer] = {
        one.scheme.quantizer for one in weights if isinstance(one.scheme, Quantized)
    }
    quantizer = _best(quantizers)
    fitting = tuple(
        Quantized("affine", bits, size, quantizer)
        for bits, size in LADDER
        if bits >= least_bits and all(one.weight.shape[-1] % size == 0 for one in weights)
    )
    if not fitting:
        raise RecipeError(
            f"{kind.title}: no scheme has at least {least_bits} bits and a group size that divides "
            f"its weights; the most bits are {LADDER[-1][0]}. Lower --floor {kind.group}."
        )
    return fitting
