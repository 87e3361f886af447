"""Numbers as a person reads them. Sizes are decimal (10⁹ bytes are a GB), as files are listed."""

from collections.abc import Sequence

_GROUP_TITLES = {
    "routed_experts": "Routed experts",
    "shared_experts": "Shared experts",
    "dense_mlp": "Dense MLP",
    "attention": "MLA attention",
    "indexer": "DSA indexer",
    "router": "Router",
    "norms": "Norms",
    "embeddings": "Token embedding",
    "lm_head": "LM head",
    "mtp": "MTP",
}


def size(size_bytes: float) -> str:
    """Return bytes with a unit: 237.9 GB, 7.24 GB, 5.04 MB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= scale:
            return f"{_three_digits(size_bytes / scale)} {unit}"
    return f"{size_bytes:.0f} B"


def count(number: float) -> str:
    """Return a count with a unit: 743.4B, 40.3B, 5.42M, 850."""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{_three_digits(number / scale)}{unit}"
    return f"{number:.0f}"


def percent(share: float) -> str:
    """Return a share as percent: 97.5 %, 1.73 %, 0.026 %."""
    value = share * 100
    if value < 1e-9:
        return "0 %"
    digits = 1 if value >= 10 else 2 if value >= 0.1 else 3 if value >= 0.001 else 5
    return f"{value:.{digits}f} %"


def duration(seconds: float) -> str:
    """Return a time span with one unit: 34 s, 41 min, 5.2 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def tokens(number: int) -> str:
    """Return a number of tokens: 8K, 1M, 512, 7,586."""
    if number and number % (1 << 20) == 0:
        return f"{number >> 20}M"
    if number and number % 1024 == 0:
        return f"{number >> 10}K"
    return f"{number:,}"


def about_tokens(number: int) -> str:
    """Return a number of tokens rounded down for a statement about capacity: 208K, 1M, 512."""
    if number >= 1 << 20:
        return f"{number / (1 << 20):.3g}M"
    return f"{number >> 10}K" if number >= 1024 else f"{number}"


def with_error(value: float, standard_error: float | None, digits: int = 3) -> str:
    """Return a figure with its error, where it has one: 19.994 ± 0.312."""
    error = "" if standard_error is None else f" ± {standard_error:.{digits}f}"
    return f"{value:.{digits}f}{error}"


def bucket(bucket: str, index_topk: int) -> str:
    """Return which positions a row of a divergence is of: all, up to 2,048, after 2,048."""
    places = {"below": f"up to {index_topk:,}", "above": f"after {index_topk:,}"}
    return places.get(bucket, bucket)


def group_title(group: str) -> str:
    """Return a component group as a heading."""
    return _GROUP_TITLES.get(group, group)


def schemes(shares: dict[str, int]) -> str:
    """Return the schemes of a group, most parameters first."""
    return " + ".join(_spell(scheme) for scheme in shares)


def and_list(items: Sequence[str]) -> str:
    """Join words: "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _three_digits(value: float) -> str:
    digits = 1 if value >= 100 else 2 if value >= 1 else 3
    return f"{value:.{digits}f}" if value < 1000 else f"{value:,.0f}"


def _spell(scheme: str) -> str:
    return {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}.get(scheme, scheme)
