"""Settings that recipes no longer have, and the line that says the same today."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, cast

# Of (section, key): the measure that `bounds` names, and which end the value was.
_BOUNDS = {
    ("parity", "max_relative_logit_error"): ("logit_error", "max"),
    ("parity", "max_layer_error"): ("layer_error", "max"),
    ("parity", "max_mean_kl"): ("mean_kl", "max"),
    ("parity", "min_top1_agreement"): ("top1_agreement", "min"),
    ("divergence", "max_mean_kl"): ("mean_kl", "max"),
    ("divergence", "max_p99_kl"): ("p99_kl", "max"),
    ("divergence", "min_top1_agreement"): ("top1_agreement", "min"),
    ("divergence", "max_perplexity_ratio"): ("nll_difference", "max"),
    ("evaluation", "max_perplexity"): ("perplexity", "max"),
    ("evaluation", "min_needle_score"): ("needle", "min"),
}


def replacements(recipe: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    """Yield where a recipe has a setting that is gone, and what to write in its place.

    Args:
        recipe: the parsed YAML, not yet validated.

    Yields:
        (section, key), and a sentence with the new line.
    """
    for (name, key), (measure, end) in _BOUNDS.items():
        section = recipe.get(name)
        if isinstance(section, dict) and key in section:
            fields = cast("dict[str, Any]", section)
            lines = "; ".join(
                f"- {{measure: {bounded}, {end}: {_limit(key, fields[key])}}}"
                for bounded in _measures(measure, fields)
            )
            yield (
                (name, key),
                (
                    f"{name}.{key}: bounds have one form now. Write in {name}, under `bounds:`, "
                    f"in place of `{key}: {fields[key]}`: {lines}"
                ),
            )


def _measures(measure: str, section: Mapping[str, Any]) -> list[str]:
    """Return the measures that a setting bounded: `max_perplexity` held every text."""
    if measure != "perplexity":
        return [measure]
    kinds = (section.get(kind) for kind in ("perplexity_texts", "perplexity_datasets"))
    texts = [name for kind in kinds if isinstance(kind, dict) for name in cast("Any", kind)]
    return [measure, *(f"{measure}/{name}" for name in texts)]


def _limit(key: str, value: Any) -> Any:
    """Return the new bound: a ratio of perplexities is a difference of their logarithms."""
    is_ratio = key == "max_perplexity_ratio" and isinstance(value, int | float) and value > 0
    return f"{math.log(value):.6g}" if is_ratio else value
