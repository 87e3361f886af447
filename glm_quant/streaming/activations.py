"""Hidden states between two layers: on disk, so that a killed pass goes on at its layer.

The states of some sequences (a *wave*, as many as fit into memory at once) stand in one file a
layer. A file is whole or absent; the files of a layer go when all of the next layer's stand.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.numpy import save_file

from glm_quant.artifact import full_disk_named, publish_file, sync_file
from glm_quant.litter import entries

Arrays = Mapping[str, NDArray[Any]]

_NAME = re.compile(r"layer-(\d+)-wave-(\d+)\.safetensors")


def save_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays so that `path` is whole or absent.

    Raises:
        DiskSpaceError: the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    with full_disk_named(path.parent):
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, temporary)
        with temporary.open("rb+") as file:
            sync_file(file.fileno())
        publish_file(temporary, path)


def load_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Read what `save_arrays` wrote."""
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping


class Activations:
    """The files of one pass in a folder that is ours alone."""

    def __init__(self, folder: Path, waves: int) -> None:
        """Open the folder and delete what a killed process left half written."""
        self._folder = folder
        self._waves = waves
        folder.mkdir(parents=True, exist_ok=True)
        for path in entries(folder):
            if not _NAME.fullmatch(path.name):
                path.unlink()

    def path(self, layer: int, wave: int) -> Path:
        """Return where a wave's states after a layer stand; -1 is after the embeddings."""
        return self._folder / f"layer-{layer + 1:03d}-wave-{wave:03d}.safetensors"

    def has(self, layer: int, wave: int) -> bool:
        """Whether a wave has passed a layer."""
        return self.path(layer, wave).is_file()

    def passed(self) -> int | None:
        """Return the last layer that all waves have passed; None before the embeddings."""
        counts: dict[int, int] = {}
        for path in entries(self._folder):
            if match := _NAME.fullmatch(path.name):
                layer = int(match[1]) - 1
                counts[layer] = counts.get(layer, 0) + 1
        whole = [layer for layer, count in counts.items() if count == self._waves]
        return max(whole, default=None)

    def forget_before(self, layer: int) -> None:
        """Delete the files of the layers before one."""
        for path in entries(self._folder):
            match = _NAME.fullmatch(path.name)
            if match and int(match[1]) - 1 < layer:
                path.unlink()
