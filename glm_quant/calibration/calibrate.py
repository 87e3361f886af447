"""`glm-quant calibrate`: one streamed pass of the source, and an imatrix folder from it.

Every weight is read once, in the order of the layers, however many tokens there are; memory is that
of the streamed comparison (`evaluation.memory_plan`). The sums of each layer are kept beside its
states, so an interrupted pass goes on at its layer and what stands is the same.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np

from glm_quant.artifact import FileDigest, require_space
from glm_quant.calibration.observe import Observer, Sums
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import OutputError
from glm_quant.evaluation.activations import load_arrays, save_arrays
from glm_quant.evaluation.divergence import half_of_memory, reference_key
from glm_quant.evaluation.memory_plan import disk_bytes, plan_memory
from glm_quant.evaluation.streaming import stream_states
from glm_quant.evaluation.token_set import TokenSet, make_token_set
from glm_quant.evaluation.weights import SourceWeights
from glm_quant.fingerprint import fingerprint
from glm_quant.model.geometry import Geometry
from glm_quant.quantize.imatrix import (
    RECORD_NAME,
    TENSORS_NAME,
    CalibratedWeight,
    ImatrixRecord,
    usable,
)
from glm_quant.recipe import DivergenceSettings
from glm_quant.workspace import Workspace

# Raise it when energies change their meaning.
VERSION = 1
# An expert that met fewer tokens says little of its own; it gets the layer's mean.
LEAST_TOKENS = 32


def calibration_tokens(
    source: Checkpoint,
    texts: Sequence[Path] | None,
    tokens: int,
    context: int,
    *,
    total: int | None = None,
) -> TokenSet:
    """Cut texts into sequences with the source's tokenizer.

    Args:
        source: whose tokenizer.
        texts: files; default: this package's own modules, which no default evaluation reads.
        tokens: at most so many of each text.
        context: tokens of a sequence.
        total: at most so many of all texts together, sequences spread evenly over them.

    Raises:
        RecipeError: a text cannot be read.
    """
    if texts is None:
        package = Path(str(files("glm_quant")))
        texts = sorted(path for path in package.rglob("*.py") if path.stat().st_size > 1 << 12)
    names = {f"{i:03d} {path.name}": str(path) for i, path in enumerate(texts)}
    settings = DivergenceSettings(texts=names, tokens=max(tokens, context), context=context)
    made = make_token_set(source, settings)
    return made if total is None else made.spread(max(total // context, 1))


def calibrate(
    source: Checkpoint,
    tokens: TokenSet,
    output: Path,
    *,
    memory_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImatrixRecord:
    """Make an imatrix folder, or return the record of the one that stands.

    Args:
        source: the checkpoint, anywhere.
        tokens: what passes through it.
        output: folder to make.
        memory_bytes: what the pass may take; default: half of the machine's memory.
        progress: called with layers done and layers to do.

    Raises:
        OutputError: the folder holds something else.
        EvaluationError: the memory is too small for the longest sequence.
        BusyError: another process makes it.
    """
    output = output.expanduser().absolute()
    key = fingerprint(
        {
            "version": VERSION,
            "least_tokens": LEAST_TOKENS,
            "states": reference_key(source, tokens.sha256),
        }
    )
    known = ImatrixRecord.load(output / RECORD_NAME)
    if known is not None and known.fingerprint == key and known.is_whole(output):
        return known
    strangers = sorted(
        p.name for p in output.glob("*") if p.name not in (TENSORS_NAME, RECORD_NAME)
    )
    if strangers:
        raise OutputError(
            f"{output}: the folder holds something else ({strangers[0]}). Choose an empty folder "
            "for --output."
        )
    beside = Workspace(output.with_name(f".{output.name}.glm-quant"))
    beside.create()
    with beside.locked():
        states = beside.scratch / key[:16]
        sums = _pass(source, tokens, states, memory_bytes or half_of_memory(), progress)
        record = _write(source, tokens, output, key, sums)
        shutil.rmtree(beside.scratch)
    return record


def _pass(
    source: Checkpoint,
    tokens: TokenSet,
    folder: Path,
    memory_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> dict[str, Sums]:
    """Stream the source with listeners in it; returns the sums of all layers."""
    weights = SourceWeights(source)
    geometry = Geometry.from_config(source.config)
    lengths = [len(sequence) for sequence in tokens.sequences]
    plan = plan_memory(geometry, lengths, memory_bytes, weights.runtime.BLOCK_ELEMENTS)
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, disk_bytes(geometry, sum(lengths)), "the hidden states of a pass")
    keeper = _Keeper(folder, geometry.n_routed_experts)
    stream_states(weights, tokens.sequences, plan, folder, progress, keeper)
    return keeper.all(geometry.num_hidden_layers, len(plan.waves))


class _Keeper(Observer):
    """An observer whose sums are on disk, a file for each layer and wave."""

    def __init__(self, folder: Path, experts: int) -> None:
        super().__init__(experts)
        self._folder = folder

    def passed(self, index: int, wave: int) -> None:
        """Keep the sums of a wave, before its states are kept, and begin the next at nothing."""
        arrays: dict[str, Any] = {}
        for path, sums in self.sums.items():
            arrays |= {f"{path}.squares": sums.squares, f"{path}.counts": sums.counts}
        save_arrays(self._path(index, wave), arrays)
        self.sums.clear()

    def all(self, layers: int, waves: int) -> dict[str, Sums]:
        """Read all sums, in the order of layers and waves."""
        total: dict[str, Sums] = {}
        for index in range(layers):
            for wave in range(waves):
                arrays = load_arrays(self._path(index, wave))
                for name in sorted(n for n in arrays if n.endswith(".squares")):
                    path, squares = name.removesuffix(".squares"), arrays[name]
                    sums = total.setdefault(path, Sums(*squares.shape))
                    sums.squares += squares
                    sums.counts += arrays[f"{path}.counts"]
        return total

    def _path(self, index: int, wave: int) -> Path:
        return self._folder / f"sums-{index:03d}-{wave:03d}.safetensors"


def _write(
    source: Checkpoint, tokens: TokenSet, output: Path, key: str, sums: dict[str, Sums]
) -> ImatrixRecord:
    tensors: dict[str, Any] = {}
    weights: dict[str, CalibratedWeight] = {}
    coverage: dict[int, list[int]] = {}
    for path, found in sums.items():
        energies, thin = usable(found.squares, found.counts, LEAST_TOKENS)
        # What meets the same input shares a tensor.
        name = path.replace(".up_proj", ".gate_proj")
        tensors[name] = energies
        weights[path] = CalibratedWeight(
            tensor=name,
            sha256=hashlib.sha256(np.ascontiguousarray(energies).data).hexdigest(),
            units=len(energies),
            thin=thin if ".switch_mlp." in path else 0,
        )
        if path.endswith(".switch_mlp.gate_proj"):
            coverage[int(path.split(".")[2])] = found.counts.tolist()
    output.mkdir(parents=True, exist_ok=True)
    (output / RECORD_NAME).unlink(missing_ok=True)
    save_arrays(output / TENSORS_NAME, tensors)
    record = ImatrixRecord(
        fingerprint=key,
        outputs=[FileDigest.of(output, TENSORS_NAME)],
        source=source.source.uri,
        tokens=sum(len(sequence) for sequence in tokens.sequences),
        tokens_sha256=tokens.sha256,
        least_tokens=LEAST_TOKENS,
        weights=weights,
        coverage=coverage,
    )
    record.save(output / RECORD_NAME)
    return record
