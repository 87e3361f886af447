"""The importance matrix on disk: E[x²] of the inputs that each column of a weight meets.

`glm-quant calibrate` writes it, `search` weighs errors by it. A folder holds `imatrix.safetensors`
and its record. A tensor is [units, width], one row for each expert (or head) of a weight, ready to
use: of mean 1 in each row, with no column so small that its error would cost nothing. With
`--factors` it also holds what `gptq` needs, a file for each input of each layer. A recipe names a
folder, but fingerprints hold the digests of what each weight uses itself, so another calibration
remakes only the shards that it changes.
"""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from glm_quant.artifact import Record
from glm_quant.errors import IntegrityError, RecipeError

TENSORS_NAME = "imatrix.safetensors"
RECORD_NAME = "imatrix.json"


class CalibratedWeight(BaseModel):
    """What the record says of one weight.

    Attributes:
        tensor: in `imatrix.safetensors`; gate and up of a layer share one.
        sha256: of its bytes.
        units: its rows.
        thin: units that met too few tokens and have the mean of all instead.
        factor: file of the upper Cholesky factor of H⁻¹, float32 [width, width], where there is
            one: H = E[x xᵀ] over the tokens of all units, damped.
        factor_sha256: of the factor's own bytes.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    tensor: str
    sha256: str
    units: int
    thin: int = 0
    factor: str | None = None
    factor_sha256: str | None = None


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
            f"importance of {len(self.weights)} weights from {self.tokens:,} tokens; {thin:,} of "
            f"{units:,} routed experts met fewer than {self.least_tokens} and have their layer's "
            "mean"
        )


@dataclass(frozen=True)
class Importance:
    """A weight's importance in an imatrix on disk; rows are read when they are needed."""

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


@dataclass(frozen=True)
class Factor:
    """A weight's factor in an imatrix on disk; read when it is needed."""

    file: Path
    sha256: str

    def load(self) -> NDArray[np.float32]:
        """Return U [width, width], checked when it is read.

        Raises:
            IntegrityError: it is not what was recorded.
        """
        return _factor(self.file, self.sha256)


class Imatrix:
    """An imatrix folder, checked."""

    def __init__(self, folder: Path, record: ImatrixRecord, tensors: Path | None = None) -> None:
        """Remember them; `tensors` is where the tensors stand, if not in the folder."""
        self.record = record
        self.folder = folder
        self._file = tensors or folder / TENSORS_NAME

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
            # A factor's digest is checked when it is read: all of them may have tens of GB.
            if output.path == TENSORS_NAME or not output.is_there(folder):
                output.check(folder)
        return cls(folder, record)

    def importance(self, path: str) -> Importance | None:
        """Return the importance of the weight at an MLX module path, if it has any."""
        known = self.record.weights.get(path)
        if known is None:
            return None
        return Importance(self._file, known.tensor, known.sha256, known.units)

    @property
    def has_factors(self) -> bool:
        """Whether it was made for `gptq`."""
        return any(weight.factor for weight in self.record.weights.values())

    def factor(self, path: str) -> Factor | None:
        """Return the factor for the weight at an MLX module path, if it has one."""
        known = self.record.weights.get(path)
        if known is None or known.factor is None or known.factor_sha256 is None:
            return None
        return Factor(self.folder / known.factor, known.factor_sha256)


@lru_cache(maxsize=2)
def _factor(file: Path, sha256: str) -> NDArray[np.float32]:
    try:
        array: NDArray[np.float32] = load_file(file)["factor"]
    except (OSError, SafetensorError, KeyError) as error:
        raise IntegrityError(
            f"{file}: the factor cannot be read ({error}). Calibrate again."
        ) from None
    found = hashlib.sha256(array.data).hexdigest()
    if found != sha256:
        raise IntegrityError(
            f"{file}: the record says sha256 {sha256} of the factor, the file has {found}. "
            "Calibrate again."
        )
    return array


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
