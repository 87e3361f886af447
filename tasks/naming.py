"""What runs are called in the UI: what they make of what, not three words drawn by lot."""

import re
from collections.abc import Mapping
from typing import Any, cast

from prefect.runtime import flow_run
from pydantic import BaseModel


def release_name() -> str:
    """Return "recipe" or "recipe of source" for a run of the flow `glm-quant`."""
    spec = _plain(flow_run.parameters["spec"])
    source = spec.get("source")
    return _recipe(spec) + (f" of {short_source(source)}" if source else "")


def assess_name() -> str:
    """Return "assess folder" for a run of the flow `glm-quant-assess`."""
    return f"assess {_plain(flow_run.parameters['spec'])['checkpoint']}"


def short_source(uri: str) -> str:
    """Return a source in few characters: the repository, and seven digits of a commit."""
    short = uri.partition("://")[2] or uri.rstrip("/").rpartition("/")[2]
    return re.sub(r"@([0-9a-f]{7})[0-9a-f]{33}$", r"@\1", short)


def _recipe(spec: Mapping[str, Any]) -> str:
    return str(spec["recipe"]).rpartition("/")[2].removesuffix(".yaml").removesuffix(".yml")


def _plain(spec: Any) -> dict[str, Any]:
    """Return parameters as a mapping: Prefect gives the model, or what it was made from."""
    if isinstance(spec, BaseModel):
        return spec.model_dump()
    return cast("dict[str, Any]", spec)
