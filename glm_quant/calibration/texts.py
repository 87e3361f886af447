"""What calibration reads: texts of the recipe or built-in ones, never those that are evaluated."""

from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import RecipeError
from glm_quant.evaluation.token_set import TokenSet, make_token_set, read_files, read_texts
from glm_quant.recipe import Recipe
from glm_quant.settings import CalibrationSettings

_BUILT_IN = ("english.txt", "chinese.txt", "languages.txt", "code.txt", "chat.json")


def calibration_texts(settings: CalibrationSettings) -> Mapping[str, str]:
    """Return the text of each slice.

    Raises:
        RecipeError: a file cannot be read.
    """
    if settings.texts is not None:
        return read_files(settings.texts, "calibration.texts")
    folder = files("glm_quant.calibration").joinpath("texts")
    return {
        name.partition(".")[0]: folder.joinpath(name).read_text(encoding="utf-8")
        for name in _BUILT_IN
    }


def calibration_set(source: Checkpoint, settings: CalibrationSettings) -> TokenSet:
    """Cut the texts into sequences with the source's tokenizer.

    Raises:
        RecipeError: a text cannot be read, or is empty.
    """
    return make_token_set(source, settings, calibration_texts(settings))


def require_apart(recipe: Recipe, settings: CalibrationSettings) -> None:
    """Check that nothing is evaluated on a text that the build is calibrated on.

    Raises:
        RecipeError: one of them is; names both places.
    """
    named = recipe.evaluation.perplexity_texts
    if recipe.evaluation.perplexity_text is not None:
        named = named | {"perplexity_text": recipe.evaluation.perplexity_text}
    evaluated = {
        text: f"divergence.texts.{name}" for name, text in read_texts(recipe.divergence).items()
    } | {text: f"evaluation.{name}" for name, text in read_files(named, "evaluation").items()}
    for name, text in calibration_texts(settings).items():
        if text in evaluated:
            raise RecipeError(
                f"{recipe.file}: calibration.texts.{name} is the same text as {evaluated[text]}. "
                "What a build was fitted to says nothing of its quality; take another text for "
                "one of them."
            )


def named_texts(paths: Sequence[Path] | None) -> dict[str, str] | None:
    """Return files by names of slices, as a recipe has them."""
    if paths is None:
        return None
    return {f"{i:03d} {path.name}": str(path) for i, path in enumerate(paths)}
