"""Recipes: what to make, as data. YAML read and checked by pydantic.

Rules are tried in order and the first match wins; what no rule matches is an error at planning, and
so is a rule that matches nothing. Every complaint names the file and the line.
"""

import re
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import yaml
from pydantic import Field, ValidationError, model_validator

from glm_quant.errors import RecipeError
from glm_quant.retired import replacements
from glm_quant.settings import (
    PARITY_FIGURES,
    Bound,
    CalibrationSettings,
    DivergenceSettings,
    EvaluationSettings,
    Section,
    require_measured,
)

ComponentGroup = Literal[
    "routed_experts",
    "shared_experts",
    "dense_mlp",
    "attention",
    "indexer",
    "router",
    "norms",
    "embeddings",
    "lm_head",
    "mtp",
    "other",
]
StoredDtype = Literal["source", "bfloat16", "float16", "float32"]
Mode = Literal["affine", "mxfp4", "nvfp4", "mxfp8"]
# How the affine mode's scales and biases are chosen; the other modes have one way.
Quantizer = Literal["minmax", "search", "gptq"]
# Weights that stop a conversion unless the recipe allows them: see `quantize.sanity`.
Defect = Literal["zero_weights", "equal_weights"]
# Those that use a calibration.
_CALIBRATED: frozenset[Quantizer] = frozenset({"search", "gptq"})

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
# What a runtime in float32 may differ by from transformers where a recipe gives no bound: several
# times what was measured (1e-6 to 6e-6, `tests/parity`).
RUNTIME_ERROR = 2e-5
# What mx.quantize 0.32 accepts.
_AFFINE_BITS = (2, 3, 4, 5, 6, 8)
_AFFINE_GROUP_SIZES = (32, 64, 128)
_FIXED = {"mxfp4": (4, 32), "nvfp4": (4, 16), "mxfp8": (8, 32)}


class Rule(Section):
    """One rule: which weights, and what becomes of them.

    Exactly one of `group` and `match` selects; exactly one of `bits`, `dtype` and `drop` decides.
    """

    group: ComponentGroup | tuple[ComponentGroup, ...] | None = None
    match: str | None = Field(default=None, description="regular expression on the MLX module path")
    layers: tuple[int, int] | None = Field(
        default=None, description="first and last layer that the rule speaks of; default: all"
    )
    bits: int | None = None
    group_size: int = 64
    mode: Mode = "affine"
    quantizer: Quantizer | None = Field(default=None, description="default: the recipe's")
    as_convert: bool = Field(
        default=False,
        description="quantize only what `mlx_lm.convert` would, in the bits that the model's class "
        "asks for where it asks for some; the rest keeps its dtype",
    )
    dtype: StoredDtype | None = None
    drop: bool = False
    line: int = Field(default=0, exclude=True)

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.group is None) == (self.match is None):
            raise ValueError("a rule needs exactly one of `group` and `match`")
        if sum((self.bits is not None, self.dtype is not None, self.drop)) != 1:
            raise ValueError("a rule needs exactly one of `bits`, `dtype` and `drop: true`")
        if self.match is not None:
            try:
                re.compile(self.match)
            except re.error as error:
                raise ValueError(
                    f"match {self.match!r} is no regular expression: {error}"
                ) from None
        if self.layers is not None and not 0 <= self.layers[0] <= self.layers[1]:
            raise ValueError(f"layers is {list(self.layers)}: give the first and the last layer")
        if self.bits is not None:
            self._check_scheme(self.bits)
        elif self.quantizer is not None or self.as_convert:
            name = "quantizer" if self.quantizer is not None else "as_convert"
            raise ValueError(f"{name} is given without `bits`: nothing is quantized here")
        return self

    def _check_scheme(self, bits: int) -> None:
        if self.quantizer is not None and self.mode != "affine":
            raise ValueError(f"quantizer is for the affine mode; {self.mode} has only MLX's own")
        if self.mode in _FIXED:
            if (bits, self.group_size) != _FIXED[self.mode]:
                fixed = _FIXED[self.mode]
                raise ValueError(f"{self.mode} has {fixed[0]} bits and group_size {fixed[1]}")
        elif bits not in _AFFINE_BITS:
            raise ValueError(f"bits is {bits}; MLX has {', '.join(map(str, _AFFINE_BITS))}")
        elif self.group_size not in _AFFINE_GROUP_SIZES:
            sizes = ", ".join(map(str, _AFFINE_GROUP_SIZES))
            raise ValueError(f"group_size is {self.group_size}; MLX has {sizes}")

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        return None if self.match is None else re.compile(self.match)

    def matches(self, path: str, group: ComponentGroup) -> bool:
        """Whether the rule speaks of the weight with this MLX path and component group."""
        if self.layers is not None:
            layer = _LAYER.match(path)
            if layer is None or not self.layers[0] <= int(layer[1]) <= self.layers[1]:
                return False
        if self._pattern is not None:
            return self._pattern.search(path) is not None
        wanted = self.group if isinstance(self.group, tuple) else (self.group,)
        return group in wanted

    @property
    def groups(self) -> frozenset[ComponentGroup]:
        """The component groups that it names."""
        named = self.group if isinstance(self.group, tuple) else (self.group,)
        return frozenset(group for group in named if group is not None)

    def describe(self) -> str:
        """Return the selector as a person would say it."""
        where = f", layers {self.layers[0]} to {self.layers[1]}" if self.layers else ""
        if self.match is not None:
            return f"match {self.match!r}{where}"
        groups = self.group if isinstance(self.group, tuple) else (str(self.group),)
        return f"group {', '.join(groups)}{where}"


class ParitySettings(Section):
    """What the parity stage runs and the bounds that stop the flow before publishing."""

    tokens: int = Field(default=256, ge=8, description="length of the fixed prompt in tokens")
    seed: int = 0
    layers: Literal["all"] | tuple[int, ...] = "all"
    prompt: str | None = Field(
        default=None, description="text of the prompt; default: a built-in one"
    )
    bounds: tuple[Bound, ...] = Field(
        default=(),
        description="layer_error and logit_error, the runtime's, are at most 2e-5 without one",
    )

    @model_validator(mode="after")
    def _bounds_are_measured(self) -> Self:
        require_measured(self.bounds, PARITY_FIGURES)
        for bound in self.bounds:
            if bound.baseline is not None:
                raise ValueError(
                    f"the bound on {bound.measure} names a baseline; parity compares the build "
                    "with its source alone. Give it to `divergence` or `evaluation`"
                )
        return self

    @property
    def max_layer_error(self) -> float:
        """The largest error of a layer's blocks that is allowed."""
        return self._most("layer_error")

    @property
    def max_logit_error(self) -> float:
        """The largest error of the whole model's logits that is allowed."""
        return self._most("logit_error")

    def _most(self, measure: str) -> float:
        limits = [b.max for b in self.bounds if b.measure == measure and b.max is not None]
        return min(limits, default=RUNTIME_ERROR)


class PublishSettings(Section):
    """Where a build goes and what it is called there."""

    name: str | None = Field(default=None, description="repository or folder name of the build")
    targets: tuple[str, ...] = ()
    license: str = "mit"
    acknowledge_license: str | None = Field(
        default=None,
        description="name, or sha256 of the LICENSE file, of a source licence that is not open",
    )
    private: bool = Field(default=False, description="create the repository for its owner only")
    keep_local: bool = Field(
        default=True,
        description="false: a shard goes from this disk when every target that answers has it; "
        "parity and evaluation fetch the build back",
    )
    keep_previous: bool = Field(
        default=False, description="leave earlier builds in an S3 bucket where they are"
    )
    base_model: str | None = None
    languages: tuple[str, ...] = ("en", "zh")
    approval: bool = Field(
        default=False, description="ask for a person's word before anything is published"
    )


# What `records` may be.
S3_PLACE = "^s3://."


class RecordsSettings(Section):
    """Where a build's records are copied to, so that another machine can take it over."""

    uri: str = Field(pattern=S3_PLACE, description="s3://bucket/prefix, one for each build")
    lease_seconds: float = Field(
        default=600, ge=1, description="silence after which another machine may take over"
    )


class Recipe(Section):
    """A whole recipe."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    description: str
    source: str | None = Field(default=None, description="default source; --source overrides it")
    quantizer: Quantizer = Field(default="minmax", description="of rules that do not name theirs")
    imatrix: str | None = Field(
        default=None,
        description="folder that `glm-quant calibrate` made, for `search` and `gptq`; default: "
        "made in the workspace, as `calibration` says",
    )
    calibration: CalibrationSettings | None = Field(
        default=None,
        description="given: `search` weighs errors by what inputs are measured; `gptq` always does",
    )
    allow: tuple[Defect, ...] = Field(
        default=(),
        description="what a release's weights never are, but those of pruned, upcycled or freshly "
        "initialised models may be",
    )
    shard_bytes: int = Field(
        default=5 << 30, ge=1 << 16, description="largest payload of an output shard"
    )
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    parity: ParitySettings = ParitySettings()
    divergence: DivergenceSettings = DivergenceSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    publish: PublishSettings = PublishSettings()
    baselines: dict[str, str] = Field(
        default={},
        description="builds to compare with, by name: a workspace, an evaluation's record, or the "
        "folder of a checkpoint, which is then measured too",
    )
    # Decides no byte of a build, and is nobody's business who reads the manifest.
    records: RecordsSettings | None = Field(default=None, exclude=True)
    file: str = Field(default="", exclude=True)

    @model_validator(mode="after")
    def _imatrix_is_used(self) -> Self:
        if self.imatrix is not None and self.calibration is not None:
            raise ValueError("give `imatrix`, or `calibration` to make one, but not both")
        for name in ("imatrix", "calibration"):
            if getattr(self, name) is not None and not self._quantizers & _CALIBRATED:
                raise ValueError(
                    f"{name} is given, but no rule has the quantizer `search` or `gptq`, which use "
                    "it"
                )
        return self

    @property
    def _quantizers(self) -> set[Quantizer]:
        affine = (rule for rule in self.rules if rule.bits and rule.mode == "affine")
        return {rule.quantizer or self.quantizer for rule in affine}

    @property
    def wants_factors(self) -> bool:
        """Whether a rule's quantizer is `gptq`, which needs what `calibrate --factors` makes."""
        return "gptq" in self._quantizers

    @property
    def own_calibration(self) -> CalibrationSettings | None:
        """What the build is to be calibrated on in its own workspace, if it is."""
        if self.imatrix is not None or not self._quantizers & _CALIBRATED:
            return None
        return self.calibration or (CalibrationSettings() if self.wants_factors else None)

    @model_validator(mode="after")
    def _baselines_are_known(self) -> Self:
        for bound in (*self.divergence.bounds, *self.evaluation.bounds):
            if bound.baseline is not None and bound.baseline not in self.baselines:
                known = ", ".join(self.baselines) or "none"
                raise ValueError(
                    f"a bound on {bound.measure} names {bound.baseline!r} as baseline; `baselines` "
                    f"has {known}"
                )
        return self

    def where(self, rule: Rule) -> str:
        """Return "file:line" of a rule, for messages."""
        return f"{self.file}:{rule.line}"


def recipe_names() -> list[str]:
    """Return the names of the recipes that ship with the project."""
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in files("recipes").iterdir()
        if entry.name.endswith(".yaml")
    )


def load_recipe(reference: str | Path) -> Recipe:
    """Read a recipe by path, or by the name of a file in `recipes/`.

    Raises:
        RecipeError: not found, not YAML, or not a recipe; with file and line.
    """
    path = Path(reference).expanduser()
    if path.suffix in (".yaml", ".yml") or path.is_file():
        try:
            return parse_recipe(path.read_text(encoding="utf-8"), str(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: the recipe cannot be read ({error}).") from None
    entry = files("recipes").joinpath(f"{reference}.yaml")
    if "/" in str(reference) or not entry.is_file():
        raise RecipeError(
            f"{reference}: there is no such recipe. Give a path to a .yaml file or one of "
            f"{', '.join(recipe_names())}."
        )
    return parse_recipe(entry.read_text(encoding="utf-8"), f"recipes/{reference}.yaml")


def parse_recipe(text: str, file: str) -> Recipe:
    """Read a recipe from YAML text.

    Raises:
        RecipeError: with the line of the first thing that is wrong.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # no YAMLError: 2026-13-45
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise RecipeError(f"{file}:{line}: this is not YAML ({error}).") from None
    if not isinstance(value, dict):
        raise RecipeError(f"{file}:1: a recipe is a mapping with name, description and rules.")
    fields = cast("dict[str, Any]", value)
    rules = fields.get("rules")
    for i, rule in enumerate(cast("list[Any]", rules) if isinstance(rules, list) else []):
        if isinstance(rule, dict):
            rule["line"] = _line(root, ("rules", i))
    for place, message in replacements(fields):
        raise RecipeError(f"{file}:{_line(root, place)}: {message}")
    try:
        return Recipe.model_validate({**fields, "file": file})
    except ValidationError as error:
        first = error.errors()[0]
        place = first["loc"]
        what = first["msg"].removeprefix("Value error, ")
        name = ".".join(str(part) for part in place) or "recipe"
        raise RecipeError(f"{file}:{_line(root, place)}: {name}: {what}.") from None


def _line(node: Any, place: tuple[str | int, ...]) -> int:
    """Return the 1-based line of a place in the YAML tree, or of the nearest parent there is."""
    for step in place:
        inner = None
        if isinstance(node, yaml.MappingNode):
            inner = next((v for k, v in node.value if k.value == step), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int):
            inner = node.value[step] if step < len(node.value) else None
        if inner is None:
            break
        node = inner
    return node.start_mark.line + 1 if node is not None else 1
