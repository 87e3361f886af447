"""Checkpoints to test with: a small trained one that ships, and the script that made it.

Importing this package needs neither torch nor transformers; the modules that train and measure
(`train_tiny`, `tiny_model`, `measure_tiny`) import them themselves.
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
    """Return a small data set in a peer's schema: see `make_items`."""
    return _HERE / "items" / name


__all__ = ["held_out_text", "items_path", "tiny_glm_path"]
