"""`glm-quant fit`: measure, solve, and write a recipe that `convert` takes.

The recipe to begin with says what is quantized, by which quantizer, calibrated on what, and
everything that is not about bits. What comes out is the same recipe with other bits: its header
comment says from which numbers. The budget holds the plan's exact
sizes, so the search for bits ends with a plan of the recipe as it was written, and an error if it
is above the budget.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from glm_quant import __version__
from glm_quant.artifact import write_atomic
from glm_quant.calibration.build_calibration import (
    calibrate_build,
    imatrix_folder,
    record_path,
    standing_imatrix,
)
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.scheme import Quantized
from glm_quant.errors import InputError, OutputError, RecipeError
from glm_quant.evaluation.token_set import TokenSet
from glm_quant.fit.parts import Part, divide, fitted_rules
from glm_quant.fit.record import FitPoint, FitResult
from glm_quant.fit.sensitivity import (
    MEASURES,
    DivergenceMeter,
    ErrorMeter,
    Measure,
    ScaledMeter,
    measure_costs,
)
from glm_quant.fit.solve import Front, Option, Point
from glm_quant.fit.target import Budget, parse_target
from glm_quant.model.groups import GROUPS
from glm_quant.quantize.convert import Watcher
from glm_quant.quantize.plan import Plan, make_plan
from glm_quant.recipe import ComponentGroup, Recipe, load_recipe, parse_recipe
from glm_quant.workspace import Workspace

# Streaming a source for every number is for sources up to this size; larger ones are streamed once
# for each part.
_KL_BYTES = 8 << 30


@dataclass(frozen=True)
class FitSettings:
    """What is asked of a fit, besides source and target.

    Attributes:
        recipe: to begin with.
        floors: the least bits of a group.
        bands: parts that the layers are cut into.
        measure: None is `kl` for sources up to 8 GiB, else `scaled`, in a folder on this machine.
        imatrix: folder for the recipe, in place of its own.
        workspace: for what is calibrated and measured; that of a run, or of fits to other targets,
            has some of it already. Default: `.NAME.glm-quant/` beside the recipe to write.
    """

    recipe: str
    floors: Mapping[ComponentGroup, int]
    bands: int = 4
    measure: Measure | None = None
    imatrix: str | None = None
    workspace: Path | None = None


def parse_floors(said: Sequence[str] | None) -> dict[ComponentGroup, int]:
    """Return the least bits of groups from `group=bits`.

    Raises:
        RecipeError: one is not of that form, or names no group.
    """
    names: dict[str, ComponentGroup] = {group: group for group in GROUPS}
    floors: dict[ComponentGroup, int] = {}
    for text in said or ():
        name, _, bits = text.partition("=")
        group = names.get(name)
        if group is None or not bits.isdecimal():
            raise RecipeError(
                f"--floor {text}: give group=bits, as attention=4; groups are {', '.join(GROUPS)}."
            )
        floors[group] = int(bits)
    return floors


def parse_measure(said: str | None) -> Measure | None:
    """Return the measure that a word names.

    Raises:
        RecipeError: it names none.
    """
    if said is None:
        return None
    names: dict[str, Measure] = {measure: measure for measure in MEASURES}
    if said not in names:
        raise RecipeError(f"--measure {said}: give one of {', '.join(MEASURES)}.")
    return names[said]


def fit(
    source: Checkpoint,
    target: str,
    output: Path,
    settings: FitSettings,
    make_tokens: Callable[[], TokenSet],
    watcher: Watcher,
) -> FitResult:
    """Write the recipe of least cost within a budget.

    Args:
        source: with its weights.
        target: see `parse_target`.
        output: the recipe file to write.
        settings: what else is asked.
        make_tokens: returns the token set to measure on; called when the rest of the input is
            judged.
        watcher: sees what is calibrated, where the recipe wants that, and measured.

    Raises:
        RecipeError: the target cannot be met, or recipe and floors leave nothing to fit.
        InputError: the source is large, not in a folder, and no measure is asked for.
        OutputError: the output is there already.
        BusyError: another process works in the workspace.
    """
    output = output.expanduser().absolute()
    if output.exists():
        raise OutputError(f"{output}: the file is there already. Move it, or choose another name.")
    recipe = _to_fit(settings)
    plan = make_plan(source, recipe)
    source.require_weights()
    budget = parse_target(target, plan.glm_geometry, plan.params)
    parts = divide(plan, recipe, settings.bands, settings.floors)
    smallest = plan.tensor_bytes + sum(
        part.size_bytes(part.schemes[0]) - sum(one.size_bytes for one in part.weights)
        for part in parts
    )
    if smallest > budget.size_bytes:
        raise _too_small(budget, smallest, plan.params)
    measure = _measure(source, settings.measure)
    folder = settings.workspace or output.with_name(f".{output.stem}.glm-quant")
    workspace = Workspace(folder.expanduser().absolute())
    workspace.create()
    with workspace.locked():
        if plan.uncalibrated:
            plan = make_plan(source, recipe, _calibrated(source, recipe, workspace, watcher))
            parts = divide(plan, recipe, settings.bands, settings.floors)
        watcher.begin("measure")
        divergence = DivergenceMeter(source, make_tokens(), workspace.scratch)
        meter = divergence if measure == "kl" else ScaledMeter(divergence, ErrorMeter(source))
        costs = measure_costs(
            meter,
            parts,
            workspace.records,
            lambda done, total: watcher.move("measure", done, total),
        )
        return _Fit(source, recipe, plan, parts, costs, budget, meter.describe()).write(output)


def _to_fit(settings: FitSettings) -> Recipe:
    """Return the recipe to begin with; what calibrates it unsaid is said, as `run` will read it."""
    recipe = load_recipe(settings.recipe)
    if settings.imatrix is not None:
        return recipe.model_copy(update={"imatrix": settings.imatrix, "calibration": None})
    return recipe.model_copy(update={"calibration": recipe.own_calibration})


def _calibrated(source: Checkpoint, recipe: Recipe, workspace: Workspace, watcher: Watcher) -> Path:
    """Return the folder of the calibration that the recipe wants, made if it does not stand."""
    if standing_imatrix(source, recipe, workspace) is None:
        watcher.begin("calibrate")
        record = calibrate_build(
            source, recipe, workspace, lambda done, total: watcher.move("calibrate", done, total)
        )
        record.save(record_path(workspace))
    return imatrix_folder(workspace)


def _measure(source: Checkpoint, said: Measure | None) -> Measure:
    """Return what is measured where nothing is said."""
    if said is not None:
        return said
    size = sum(source.files[name].size_bytes for name in source.index.shards)
    if size <= _KL_BYTES:
        return "kl"
    if source.source.places is not None:
        raise InputError(
            f"{source.source.uri}: measuring streams all of its {size:,} bytes over the network, "
            "at least once, and once before where the recipe wants a calibration. Fetch it into a "
            "folder first, or say `--measure scaled` to stream it all the same."
        )
    return "scaled"


class _Fit:
    """Numbers are known; what is left is to choose."""

    def __init__(
        self,
        source: Checkpoint,
        recipe: Recipe,
        plan: Plan,
        parts: list[Part],
        costs: list[list[float]],
        budget: Budget,
        cost_of: str,
    ) -> None:
        self._source, self._recipe, self._parts = source, recipe, parts
        self._budget, self._cost_of, self._params = budget, cost_of, plan.params
        self._fixed = plan.tensor_bytes - sum(
            one.size_bytes for part in parts for one in part.weights
        )
        self._front = Front(
            [
                [
                    Option(part.size_bytes(scheme), cost)
                    for scheme, cost in zip(part.schemes, found, strict=True)
                ]
                for part, found in zip(parts, costs, strict=True)
            ]
        )

    def write(self, output: Path) -> FitResult:
        """Choose, plan what was chosen, and write it down when it is within the budget."""
        limit = self._budget.size_bytes
        while True:
            point = self._front.best(limit - self._fixed)
            if point is None:
                smallest = self._fixed + int(self._front.sizes[0])
                raise _too_small(self._budget, smallest, self._params)
            recipe = self._fitted(point, output)
            plan = make_plan(self._source, recipe)
            files = sum(shard.size_bytes for shard in plan.shards)
            used = files if self._budget.headers else plan.tensor_bytes
            if used <= self._budget.size_bytes:
                break
            limit -= used - self._budget.size_bytes  # room for the headers
        result = self._result(point, plan, files, output)
        write_atomic(output, recipe_text(recipe, result).encode())
        return result

    def _schemes(self, point: Point) -> list[Quantized]:
        return [part.schemes[i] for part, i in zip(self._parts, point.picks, strict=True)]

    def _fitted(self, point: Point, output: Path) -> Recipe:
        rules = fitted_rules(self._recipe, self._parts, self._schemes(point))
        publish = self._recipe.publish.model_copy(update={"name": None})
        return self._recipe.model_copy(
            update={
                "name": output.stem,
                "description": f"{self._recipe.name}, fitted to {self._budget.said}",
                "rules": tuple(rules),
                "publish": publish,
                "file": str(output),
            }
        )

    def _result(self, point: Point, plan: Plan, files: int, output: Path) -> FitResult:
        shown = {p.size_bytes: p for p in (*self._front.spread(_SHOWN), point)}
        return FitResult(
            output=output,
            budget=self._budget.meaning,
            tensor_bytes=plan.tensor_bytes,
            file_bytes=files,
            bits_per_weight=plan.bits_per_weight,
            cost=point.cost,
            cost_of=self._cost_of,
            slack=self._front.slack,
            front=tuple(
                FitPoint(
                    tensor_bytes=self._fixed + p.size_bytes,
                    bits_per_weight=(self._fixed + p.size_bytes) * 8 / self._params,
                    cost=p.cost,
                    chosen=p == point,
                )
                for _, p in sorted(shown.items())
            ),
            choices=tuple(
                (part.title, scheme.describe())
                for part, scheme in zip(self._parts, self._schemes(point), strict=True)
            ),
        )


# Points of the front that are shown.
_SHOWN = 12


def recipe_text(recipe: Recipe, result: FitResult) -> str:
    """Return the YAML of a fitted recipe, its making in the header comment.

    Raises:
        RecipeError: it does not read back as the same recipe, which would be an error of ours.
    """
    optimum = (
        "No other choice within the budget has a lower sum."
        if result.slack == 1
        else f"No other choice within the budget has a sum below it by a factor of {result.slack}."
    )
    header = [
        f"Made by `glm-quant fit` {__version__} for a target of {result.budget}.",
        f"It plans to {result.tensor_bytes:,} bytes of tensors and {result.file_bytes:,} of files.",
        f"Cost of a part: {result.cost_of}.",
        f"The sum over all parts is {result.cost:.5g}. {optimum}",
    ]
    fields = recipe.model_dump(mode="json", exclude_defaults=True)
    body = yaml.safe_dump(fields, sort_keys=False, allow_unicode=True, width=100)
    text = "".join(f"# {line}\n" for line in header) + body
    again = parse_recipe(text, recipe.file)
    if again.model_dump() != recipe.model_dump():
        raise RecipeError(f"{recipe.file}: the recipe changed when it was written; report this.")
    return text


def _too_small(budget: Budget, smallest: int, params: int) -> RecipeError:
    return RecipeError(
        f"--target {budget.meaning}; the smallest build has {smallest:,} bytes of tensors, "
        f"{smallest * 8 / params:.3f}bpw. Raise the target, lower --floor, or give bits to what "
        "the recipe keeps in a dtype."
    )
