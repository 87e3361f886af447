"""Bounds on a config's dims, looked at before a constructor sees them.

A model class makes a Python object for each layer and a lazy array for each parameter, so a config
that claims a billion layers would fill the memory before any header contradicts it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from glm_quant.checkpoint.header import shorten
from glm_quant.errors import CheckpointError

# The largest releases have 128 layers and 896 experts; dims end at some 200,000, contexts at 10
# million.
_MOST_OF_A_COUNT = 4096
_LARGEST_DIM = 1 << 24
_DEEPEST = 32
_COUNT = re.compile(r"(layers?|experts?|depth|depths|blocks?|towers?|groups?)$")
# Whole numbers that are no dims: constants of a formula.
_NO_DIM = re.compile(r"(theta|base|scale|scaling|factor|seed|_id|_ids|_token|length|positions?)")


def require_bounded(config: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Check that no dim of a config is beyond any real model.

    Args:
        config: the config.
        keys: the keys that the model class reads; everything below them is looked at.

    Raises:
        CheckpointError: a count or a dim is too large, or the config is nested too deeply.
    """
    for key in keys:
        if key in config:
            _check(key, config[key], 0)


def _check(key: str, value: Any, depth: int) -> None:
    if depth > _DEEPEST:
        raise CheckpointError(
            f"config.json: {shorten(key)} is nested more than {_DEEPEST} deep. Fetch config.json "
            "again."
        )
    if isinstance(value, Mapping):
        for name, entry in cast("Mapping[str, Any]", value).items():
            _check(str(name), entry, depth + 1)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for entry in cast("Sequence[Any]", value):
            _check(key, entry, depth + 1)
    elif isinstance(value, int) and not isinstance(value, bool):
        most = _MOST_OF_A_COUNT if _COUNT.search(key) else _LARGEST_DIM
        if abs(value) > most and not _NO_DIM.search(key):
            raise CheckpointError(
                f"config.json: {shorten(key)} is {value:,}, beyond any real model ({most:,} is the "
                "most that is accepted). Fetch config.json again."
            )
