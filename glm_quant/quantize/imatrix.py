"""The importance matrix: how loud the inputs are that each column of a weight meets, E[x²].

`glm-quant calibrate` makes it, `search` weighs errors by it. A folder holds `imatrix.safetensors`
and its record. A tensor is [units, width], one row for each expert (or head) of a weight, ready to
use: of mean 1 in each row, with no column so quiet that its error would be free. What a reader
would get wrong: a recipe names a folder, but fingerprints hold the digest of each weight's own
energies, so another calibration remakes just the shards that it changes.
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open

from glm_quant.artifact import Record
from glm_quant.errors import RecipeError

TENSORS_NAME = "imatrix.safetensors"
RECORD_NAME = "imatrix.json"

# Below this share of a row's median an input is as quiet as a column can be.
_FLOOR = 1e-4


class CalibratedWeight(BaseModel):
    """What the record says of one weight.

    Attributes:
        tensor: in `imatrix.safetensors`; gate and up of a layer share one.
        sha256: of its bytes.
        units: its rows.
        thin: units that met too few tokens and have the mean of all instead.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: str
    sha256: str
    units: int
    thin: int = 0


class ImatrixRecord(Record):
    """What was calibrated on what.

    Attributes:
        source: where the source was.
        tokens: how many passed through the model.
        tokens_sha256: of their ids.
        least_tokens: a unit that met fewer is thin.
        weights: by MLX module path.
        coverage: tokens that each routed expert met, by layer.
    """

    source: str
    tokens: int
    tokens_sha256: str
    least_tokens: int
    weights: dict[str, CalibratedWeight]
    coverage: dict[int, list[int]]

    def describe(self) -> str:
        """Return one line: what was seen, and what was not."""
        units = sum(len(counts) for counts in self.coverage.values())
        thin = sum(n < self.least_tokens for counts in self.coverage.values() for n in counts)
        return (
            f"energies of {len(self.weights)} weights from {self.tokens:,} tokens; {thin:,} of "
            f"{units:,} routed experts met fewer than {self.least_tokens} and have their layer's "
            "mean"
        )


@dataclass(frozen=True)
class Energy:
    """A weight's energies in an imatrix on disk; rows are read when they are needed."""

    file: Path
    tensor: str
    sha256: str
    units: int

    def shape(self) -> tuple[int, ...]:
        """Return (units, width)."""
        return tuple(_opened(self.file).get_slice(self.tensor).get_shape())

    def of_rows(self, first_row: int, rows: int, all_rows: int) -> NDArray[np.float32]:
        """Return [units, width] for some rows of the weight: whole units, or a part of one."""
        each = all_rows // self.units
        begin, end = first_row // each, -(-(first_row + rows) // each)
        return _opened(self.file).get_slice(self.tensor)[begin:end]


class Imatrix:
    """An imatrix folder, checked."""

    def __init__(self, folder: Path, record: ImatrixRecord) -> None:
        """Remember them."""
        self.record = record
        self._file = folder / TENSORS_NAME

    @classmethod
    def open(cls, folder: Path) -> "Imatrix":
        """Read and check a folder.

        Raises:
            RecipeError: it is none.
            IntegrityError: its bytes are not those that were recorded.
        """
        record = ImatrixRecord.load(folder / RECORD_NAME)
        if record is None:
            raise RecipeError(
                f"{folder}: there is no whole imatrix here ({RECORD_NAME} is missing or damaged). "
                "Make it with `glm-quant calibrate --source SOURCE --output FOLDER`, or take "
                "`imatrix` out of the recipe."
            )
        for output in record.outputs:
            output.check(folder)
        return cls(folder, record)

    def energy(self, path: str) -> Energy | None:
        """Return the energies of the weight at an MLX module path, if it has any."""
        known = self.record.weights.get(path)
        if known is None:
            return None
        return Energy(self._file, known.tensor, known.sha256, known.units)


def usable(
    sums: NDArray[np.float64], counts: NDArray[np.int64], least: int
) -> tuple[NDArray[np.float32], int]:
    """Turn sums of squares into energies.

    Args:
        sums: Σx² over the tokens that each unit met, [units, width].
        counts: how many tokens these were, [units].
        least: a unit that met fewer has the mean of all tokens of all units.

    Returns:
        Energies [units, width], and how many units were thin.
    """
    thin = counts < least
    energies = np.empty(sums.shape, np.float64)
    energies[~thin] = sums[~thin] / counts[~thin, None]
    energies[thin] = sums.sum(axis=0) / max(int(counts.sum()), 1)
    silent = energies.max(axis=1) <= 0  # nothing was seen at all
    energies[silent] = 1
    floor = np.maximum(np.median(energies, axis=1), energies.mean(axis=1)) * _FLOOR
    energies = np.maximum(energies, floor[:, None])
    energies /= energies.mean(axis=1, keepdims=True)
    return energies.astype(np.float32), int(thin.sum())


_thread = threading.local()


def _opened(file: Path) -> Any:
    """Return the open file: one for each thread, and for each version of the file."""
    stat = file.stat()
    key = (file, stat.st_mtime_ns, stat.st_ino)
    opened: Mapping[Any, Any] = getattr(_thread, "opened", {})
    if key not in opened:
        try:
            opened = _thread.opened = {key: safe_open(file, "numpy")}
        except SafetensorError as error:
            raise RecipeError(f"{file}: {error}. Calibrate again.") from None
    return opened[key]
