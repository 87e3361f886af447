"""What parity's settings may be for a model: judged at plan time, and once more by the stage."""

from collections.abc import Mapping
from typing import Any

from glm_quant.errors import RecipeError
from glm_quant.recipe import ParitySettings


def require_long_prompt(
    settings: ParitySettings, config: Mapping[str, Any], file: str = "parity"
) -> None:
    """Check that the prompt is longer than what the indexer selects.

    Raises:
        RecipeError: it is not; names both numbers.
    """
    topk = int(config["index_topk"])
    if settings.tokens <= topk:
        raise RecipeError(
            f"{file}: parity.tokens is {settings.tokens:,} and index_topk is {topk:,}: every key "
            "would be selected and the indexer never put to the test. Use at least "
            f"{topk + max(topk // 8, 1):,}."
        )


def compared_layers(
    settings: ParitySettings, config: Mapping[str, Any], file: str = "parity"
) -> list[int]:
    """Return the numbers of the layers that are compared.

    Raises:
        RecipeError: the model has no such layers.
    """
    depth = int(config["num_hidden_layers"])
    layers = list(range(depth)) if settings.layers == "all" else sorted(set(settings.layers))
    if not layers or layers[0] < 0 or layers[-1] >= depth:
        raise RecipeError(f"{file}: parity.layers names layers outside 0 to {depth - 1}: {layers}.")
    return layers
