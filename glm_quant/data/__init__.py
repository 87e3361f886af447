"""Data that ships: a small trained GLM, text that it has not read, and items to evaluate it with.

`dev/` has the scripts that made them.
"""

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def tiny_glm_path() -> Path:
    """Return the folder of the trained checkpoint that ships."""
    return _HERE / "tiny-glm"


def held_out_text() -> str:
    """Return text of Python's standard library that the shipped checkpoint was not trained on."""
    return (_HERE / "held_out.txt").read_text(encoding="utf-8")


def items_path(name: str) -> Path:
    """Return a small data set in a peer's schema: see `dev/make_items.py`."""
    return _HERE / "items" / name


__all__ = ["held_out_text", "items_path", "tiny_glm_path"]
