"""What a fit came to, for people and programs."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FitPoint(_Part):
    """One point of the front: the least cost at a size."""

    tensor_bytes: int
    bits_per_weight: float
    cost: float
    chosen: bool


class FitResult(_Part):
    """What a fit came to.

    Attributes:
        output: the recipe that was written.
        budget: what the target means.
        front: the least costs from the smallest to the largest build, in steps, and the chosen one.
        choices: each part and its scheme.
        cost_of: what a cost is, in words.
        slack: the cost is at most so many times the least that is possible; 1 is the optimum.
    """

    output: Path
    budget: str
    tensor_bytes: int
    file_bytes: int
    bits_per_weight: float
    cost: float
    cost_of: str
    slack: float
    front: tuple[FitPoint, ...]
    choices: tuple[tuple[str, str], ...]
