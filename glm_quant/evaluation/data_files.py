"""Where the files are that a recipe names for the peers' protocols."""

from pathlib import Path

from glm_quant.data import items_path
from glm_quant.errors import RecipeError

_SHIPPED = "shipped:"


def data_file(named: str) -> Path:
    """Return a file by what the recipe calls it: a path, or `shipped:NAME` of this project's own.

    Raises:
        RecipeError: the project ships no such file.
    """
    if not named.startswith(_SHIPPED):
        return Path(named).expanduser()
    path = items_path(named.removeprefix(_SHIPPED))
    if not path.is_file():
        shipped = ", ".join(f"{_SHIPPED}{p.name}" for p in sorted(path.parent.glob("*.jsonl")))
        raise RecipeError(f"{named}: no such file ships with glm-quant; there is {shipped}.")
    return path
