"""Loading the runtime file that travels inside a build, as stock mlx-lm does."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from glm_quant.errors import CheckpointError


def load_runtime(folder: Path) -> ModuleType:
    """Import the runtime file that a build's config names.

    Raises:
        CheckpointError: The config names none, or the file is missing.
    """
    name = read_config(folder).get("model_file")
    if name is None or not (folder / str(name)).is_file():
        raise CheckpointError(
            f"{folder / 'config.json'}: model_file is {name!r}, and without a runtime file stock "
            "mlx-lm cannot load the build. Assemble the output again."
        )
    spec = importlib.util.spec_from_file_location("glm_runtime", folder / str(name))
    if spec is None or spec.loader is None:
        raise CheckpointError(f"{folder / str(name)}: not a Python file. Assemble it again.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_config(folder: Path) -> dict[str, Any]:
    """Return the folder's config.json."""
    return json.loads((folder / "config.json").read_text(encoding="utf-8"))
