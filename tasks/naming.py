"""What runs are called in the UI: what they make of what, not three words drawn by lot."""

import re
from collections.abc import Mapping
from typing import Any, cast

from prefect.runtime import flow_run, task_run
from pydantic import BaseModel

from glm_quant.build import BuildSpec, open_build


def release_name() -> str:
    """Return "recipe" or "recipe of source" for a run of the flow `glm-quant`."""
    spec = _plain(flow_run.parameters["spec"])
    source = spec.get("source")
    return _recipe(spec) + (f" of {short_source(source)}" if source else "")


def assess_name() -> str:
    """Return "assess folder" for a run of the flow `glm-quant-assess`."""
    return f"assess {_plain(flow_run.parameters['spec'])['checkpoint']}"


def quantize_name() -> str:
    """Return "quantize 03 of 46" for a task run of the task `quantize`."""
    return f"quantize {_which_shard()}"


def upload_name() -> str:
    """Return "upload 03 of 46 to hf://org/name" for a task run of the task `upload`."""
    return f"upload {_which_shard()} to {task_run.parameters['target']}"


def restore_name() -> str:
    """Return "fetch back 03 of 46" for a task run of the task `restore`."""
    return f"fetch back {_which_shard()}"


def short_source(uri: str) -> str:
    """Return a source in few characters: the repository, and seven digits of a commit."""
    short = uri.partition("://")[2] or uri.rstrip("/").rpartition("/")[2]
    return re.sub(r"@([0-9a-f]{7})[0-9a-f]{33}$", r"@\1", short)


def _which_shard() -> str:
    inputs = task_run.parameters
    spec = BuildSpec.model_validate(_plain(inputs["spec"]))
    total = len(open_build(spec).plan.shards)
    return f"{inputs['shard'] + 1:0{len(str(total))}d} of {total}"


def _recipe(spec: Mapping[str, Any]) -> str:
    return str(spec["recipe"]).rpartition("/")[2].removesuffix(".yaml").removesuffix(".yml")


def _plain(spec: Any) -> dict[str, Any]:
    """Return parameters as a mapping: Prefect gives the model, or what it was made from."""
    if isinstance(spec, BaseModel):
        return spec.model_dump()
    return cast("dict[str, Any]", spec)
