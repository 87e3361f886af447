"""Which scheme each weight gets: the first rule of a recipe that matches it decides."""

from collections.abc import Sequence
from typing import Any

from glm_quant.architectures.architecture import Architecture
from glm_quant.architectures.weights import OutputWeight
from glm_quant.codes.scheme import Quantized, Scheme, Stored
from glm_quant.errors import RecipeError
from glm_quant.recipe import Quantizer, Recipe, Rule

_STORED_DTYPE = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_FLOATING = frozenset(_STORED_DTYPE.values())


def assign_schemes(
    weights: Sequence[OutputWeight],
    mtp: Sequence[str],
    recipe: Recipe,
    architecture: Architecture | None,
) -> list[Scheme]:
    """Give each weight the scheme of the first rule that matches it.

    Args:
        weights: what is to be stored.
        mtp: source tensors of multi-token prediction, which rules speak of too.
        recipe: the rules.
        architecture: knows what `mlx_lm.convert` would quantize; None for GLM.

    Raises:
        RecipeError: a weight without a rule, a rule without a weight, a scheme that does not fit.
    """
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
        _scheme(first_rule(weight.path, weight.group, weight.name), weight, recipe, architecture)
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
    groups = {weight.group for weight in weights}
    for i, rule in enumerate(recipe.rules):
        # A model without a group, such as a dense one without experts, needs no recipe of its own.
        if i not in fired and (rule.match is not None or rule.groups & groups):
            raise RecipeError(
                f"{recipe.where(rule)}: the rule ({rule.describe()}) matches none of the "
                f"{len(weights):,} weights. Correct it, or remove it if an earlier rule covers it."
            )
    return schemes


def _scheme(
    rule: Rule, weight: OutputWeight, recipe: Recipe, architecture: Architecture | None
) -> Scheme:
    if rule.drop:
        raise RecipeError(
            f"{recipe.where(rule)}: the rule drops tensor {weight.name}, which the model cannot "
            "run without. Only `group: mtp` can be dropped."
        )
    # What is packed already passes as it is.
    stored = Stored(weight.source_dtype)
    if weight.keeps_dtype or weight.source_dtype not in _FLOATING:
        return stored
    if rule.bits is None:
        return Stored(_STORED_DTYPE.get(rule.dtype or "source", weight.source_dtype))
    if rule.as_convert:
        return _scheme_of_convert(rule, weight, recipe, architecture) or stored
    if not weight.quantizable:
        raise RecipeError(
            f"{recipe.where(rule)}: the rule quantizes tensor {weight.name} (group {weight.group}, "
            f"shape {list(weight.shape)}), which mlx-lm cannot run quantized. Give it a `dtype`, "
            "or the rule `as_convert: true`."
        )
    width = weight.shape[-1]
    if width % rule.group_size:
        raise RecipeError(
            f"{recipe.where(rule)}: group_size {rule.group_size} does not divide the last dim "
            f"{width} of tensor {weight.name}. Choose one of "
            f"{', '.join(str(g) for g in (32, 64, 128) if width % g == 0) or 'another dtype'}."
        )
    return Quantized(rule.mode, rule.bits, rule.group_size, _quantizer(rule, recipe))


def _scheme_of_convert(
    rule: Rule, weight: OutputWeight, recipe: Recipe, architecture: Architecture | None
) -> Quantized | None:
    """Return how `mlx_lm.convert` would quantize a weight in the rule's bits, or None."""
    if rule.bits is None or not weight.quantizable:
        return None
    width = weight.shape[-1]
    wanted: bool | dict[str, Any] = width % rule.group_size == 0
    if architecture is not None:
        wanted = architecture.convert_scheme(weight.path, width, rule.group_size)
    if isinstance(wanted, dict):
        # What the class leaves open has the defaults of mlx's affine mode.
        bits, group_size = wanted.get("bits") or 4, wanted.get("group_size") or 64
        mode = wanted.get("mode", "affine")
        return Quantized(mode, int(bits), int(group_size), _quantizer(rule, recipe))
    if not wanted:
        return None
    return Quantized(rule.mode, rule.bits, rule.group_size, _quantizer(rule, recipe))


def _quantizer(rule: Rule, recipe: Recipe) -> Quantizer:
    return rule.quantizer or recipe.quantizer if rule.mode == "affine" else "minmax"
