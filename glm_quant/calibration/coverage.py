"""Whether a calibration is worth its pass: its tokens, and how many of them an expert meets."""

from collections.abc import Iterator, Mapping
from typing import Any

from glm_quant.calibration.calibrate import LEAST_TOKENS
from glm_quant.errors import RecipeError
from glm_quant.settings import CalibrationSettings


def judge_coverage(
    tokens: int, settings: CalibrationSettings, config: Mapping[str, Any], file: str
) -> Iterator[str]:
    """Judge a calibration before its pass.

    Args:
        tokens: of all texts, none of them counted beyond `settings.tokens`.
        settings: the recipe's.
        config: the model's config.json.
        file: of the recipe, for messages.

    Yields:
        Warnings: there are fewer tokens than the recipe asks for, or experts will meet few.

    Raises:
        RecipeError: there is not one sequence of `context` tokens, or less than one token for
            each expert.
    """
    way_out = "Give calibration.texts longer texts, or leave it out for the built-in ones."
    if tokens < settings.context:
        raise RecipeError(
            f"{file}: the calibration's texts have {tokens:,} tokens, not one sequence of "
            f"calibration.context, which is {settings.context:,}. {way_out}"
        )
    experts = int(config.get("n_routed_experts") or 0)
    chosen = int(config.get("num_experts_per_tok") or 0)
    if tokens < settings.tokens:
        yield (
            f"{file}: the calibration's texts have {tokens:,} tokens, calibration.tokens asks for "
            f"{settings.tokens:,}."
        )
    if not experts:
        return
    each = tokens * chosen / experts
    if each < 1:
        raise RecipeError(
            f"{file}: {tokens:,} tokens of calibration choose {chosen} of {experts} experts each, "
            f"so an expert meets {each:.2f} tokens on average; at least 1 is needed, and "
            f"{LEAST_TOKENS} say something. {way_out}"
        )
    if each < LEAST_TOKENS:
        yield (
            f"{file}: an expert meets {each:.0f} tokens of the calibration on average; below "
            f"{LEAST_TOKENS} it gets its layer's mean."
        )
