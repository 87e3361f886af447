"""`glm-quant calibrate`: one streamed pass of the source, and an imatrix folder from it.

Every weight is read once, in the order of the layers, however many tokens there are; memory is that
of any streamed pass (`streaming.memory_plan`). What is made of a layer is kept beside its states,
so an interrupted pass continues at its layer and ends with the same bytes.
"""

import hashlib
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from glm_quant.artifact import FileDigest, require_space
from glm_quant.calibration.hessian import DAMPING, cholesky_factor, importances
from glm_quant.calibration.observe import WIDEST_GRAM, Observer, Sums, input_name
from glm_quant.calibration.one_pass import OnePass
from glm_quant.checkpoint.imatrix import (
    RECORD_NAME,
    TENSORS_NAME,
    CalibratedWeight,
    Imatrix,
    ImatrixRecord,
)
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import OutputError
from glm_quant.evaluation.divergence import reference_key
from glm_quant.evaluation.token_set import TokenSet
from glm_quant.fingerprint import fingerprint
from glm_quant.litter import entries
from glm_quant.memory import half_of_memory
from glm_quant.model.geometry import Geometry
from glm_quant.streaming.activations import load_arrays, save_arrays
from glm_quant.streaming.forward import TokenBatch, stream_batches
from glm_quant.streaming.hooks import LayerHooks
from glm_quant.streaming.memory_plan import disk_bytes, plan_memory
from glm_quant.streaming.weights import SourceWeights
from glm_quant.workspace import Workspace

# Raise it when importance changes its meaning.
VERSION = 1
_FACTOR = "factor-"
_OURS = re.compile(rf"{_FACTOR}.*|{re.escape(TENSORS_NAME)}|{re.escape(RECORD_NAME)}")
# What a killed process was writing.
_TORN = re.compile(rf"\.(?:{_OURS.pattern})\.\d+\.part")
# An expert that met fewer tokens says little of its own; it gets the layer's mean.
LEAST_TOKENS = 32


def calibrate(
    source: Checkpoint,
    tokens: TokenSet,
    output: Path,
    *,
    factors: bool = False,
    memory_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    extra_batch: TokenBatch | None = None,
    encoder: OnePass | None = None,
) -> ImatrixRecord:
    """Make an imatrix folder, or return the record of the one that stands.

    Args:
        source: the checkpoint, anywhere.
        tokens: what passes through it.
        output: folder to make.
        factors: also make what `gptq` needs: for each input of at most `WIDEST_GRAM` columns a
            square float32 matrix (GLM-5.2: about 0.35 GB a layer).
        memory_bytes: what the pass may take; default: half of the machine's memory.
        progress: called with layers done and layers to do.
        extra_batch: other tokens of the same pass, see `reference_batch`: the source is read once
            for both. Memory for them comes on top.
        encoder: encodes each layer as soon as its part is made, and fetches its shards.

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
            "factors": [str(DAMPING), WIDEST_GRAM] if factors else None,
            "states": reference_key(source, tokens.sha256),
        }
    )
    record = ImatrixRecord.load(output / RECORD_NAME)
    if record is not None and record.fingerprint == key and record.is_whole(output):
        return record
    names = [path.name for path in entries(output)]
    torn = [name for name in names if _TORN.fullmatch(name)]
    strangers = [name for name in names if name not in torn and not _OURS.fullmatch(name)]
    if strangers:
        raise OutputError(
            f"{output}: the folder holds something else ({strangers[0]}). Choose an empty folder "
            "for --output."
        )
    aside = Workspace(output.with_name(f".{output.name}.glm-quant"))
    aside.create()
    with aside.locked():
        states = aside.scratch / key[:16]
        output.mkdir(parents=True, exist_ok=True)
        for name in torn:
            (output / name).unlink(missing_ok=True)
        (output / RECORD_NAME).unlink(missing_ok=True)
        memory = memory_bytes or half_of_memory()
        weights = SourceWeights(source if encoder is None else encoder.checkpoint)
        batch, sums = _plan_batch(weights, tokens, states, memory, factors)
        head = ImatrixRecord(
            fingerprint=key,
            source=weights.checkpoint.source.uri,
            tokens=sum(map(len, batch.sequences)),
            tokens_sha256=tokens.sha256,
            least_tokens=LEAST_TOKENS,
            weights={},
            coverage={},
        )
        layers = _LayerImatrices(batch, sums, head, output, encoder)
        batches = [batch, extra_batch] if extra_batch else [batch]
        stream_batches(weights, batches, progress, layers)
        record = layers.merge(int(weights.args.num_hidden_layers))
        shutil.rmtree(aside.scratch)
    return record


def _plan_batch(
    weights: SourceWeights, tokens: TokenSet, folder: Path, memory_bytes: int, factors: bool
) -> "tuple[TokenBatch, _WaveSums]":
    """Divide the tokens into waves; returns their batch and what records its inputs."""
    geometry = Geometry.from_config(weights.checkpoint.config)
    lengths = [len(sequence) for sequence in tokens.sequences]
    plan = plan_memory(geometry, lengths, memory_bytes, weights.runtime.BLOCK_ELEMENTS)
    folder.mkdir(parents=True, exist_ok=True)
    require_space(folder, disk_bytes(geometry, sum(lengths)), "the hidden states of a pass")
    sums = _WaveSums(folder, geometry, len(plan.waves), factors)
    return TokenBatch(tokens.sequences, plan, folder, sums), sums


class _WaveSums(Observer):
    """An observer whose sums are on disk, a file for each layer and wave."""

    def __init__(self, folder: Path, geometry: Geometry, waves: int, grams: bool) -> None:
        super().__init__(geometry.n_routed_experts, grams=grams)
        self._folder = folder
        self._waves = waves

    def after_wave(self, index: int, wave: int) -> None:
        """Write the sums of a wave, before its states are kept, and begin the next at zero."""
        arrays: dict[str, Any] = {}
        for path, sums in self.sums.items():
            arrays |= {f"{path}.squares": sums.squares, f"{path}.counts": sums.counts}
            if sums.gram is not None and input_name(path) == path:
                arrays[f"{path}.gram"] = sums.gram.astype(np.float32)
        save_arrays(self._path(index, wave), arrays)
        self.sums.clear()

    def layer(self, index: int) -> dict[str, Sums]:
        """Read the sums of a layer, those of its waves added up."""
        total: dict[str, Sums] = {}
        for wave in range(self._waves):
            arrays = load_arrays(self._path(index, wave))
            for name in sorted(n for n in arrays if n.endswith(".squares")):
                path, squares = name.removesuffix(".squares"), arrays[name]
                gram = arrays.get(f"{path}.gram")
                sums = total.setdefault(path, Sums(*squares.shape, gram=gram is not None))
                sums.squares += squares
                sums.counts += arrays[f"{path}.counts"]
                if sums.gram is not None and gram is not None:
                    sums.gram += gram
        return total

    def forget(self, index: int) -> None:
        """Delete the sums of a layer."""
        for wave in range(self._waves):
            self._path(index, wave).unlink(missing_ok=True)

    def _path(self, index: int, wave: int) -> Path:
        return self._folder / f"sums-{index:03d}-{wave:03d}.safetensors"


class _LayerImatrices(LayerHooks):
    """Makes each layer's part of an imatrix when the tokens have passed it, and merges the parts.

    A layer's part is an imatrix of its own beside the states: its record says that it is whole.
    """

    def __init__(
        self,
        batch: TokenBatch,
        sums: _WaveSums,
        head: ImatrixRecord,
        output: Path,
        encoder: OnePass | None,
    ) -> None:
        self.batch = batch
        self._sums, self._head, self._output = sums, head, output
        self._encoder = encoder

    def before_layer(self, index: int) -> None:
        """Fetch the layer's shards, if the pass converts."""
        if self._encoder:
            self._encoder.before_layer(index)

    def after_layer(self, index: int) -> None:
        """Make a layer's part, and let its weights be encoded with it."""
        part = self._part(index)
        if self._encoder:
            imatrix = Imatrix(self._output, part, self._importance_path(index))
            self._encoder.encode(index, imatrix)
            self._encoder.measure(index, imatrix, self.batch, self.batch.folder)

    def merge(self, depth: int) -> ImatrixRecord:
        """Merge the parts of all layers; returns the record, which stands in the folder."""
        parts = [self._part(index) for index in range(depth)]
        tensors: dict[str, Any] = {}
        for index in range(depth):
            tensors |= load_arrays(self._importance_path(index))
        save_arrays(self._output / TENSORS_NAME, tensors)
        importance_file = FileDigest.of(self._output, TENSORS_NAME)
        record = self._head.model_copy(
            update={
                "outputs": [
                    importance_file,
                    *(output for part in parts for output in part.outputs),
                ],
                "weights": {path: w for part in parts for path, w in part.weights.items()},
                "coverage": {i: c for part in parts for i, c in part.coverage.items()},
            }
        )
        record.save(self._output / RECORD_NAME)
        return record

    def _importance_path(self, index: int) -> Path:
        return self.batch.folder / f"energies-{index:03d}.safetensors"

    def _part(self, index: int) -> ImatrixRecord:
        """Return the record of a layer's part; makes it of the sums if need be."""
        path = self.batch.folder / f"energies-{index:03d}.json"
        record = ImatrixRecord.load(path)
        if record is not None and record.is_whole(self._output):
            return record
        record = self._make(index)
        record.save(path)
        # After the record: until it stands, the sums are what a resumed pass needs.
        self._sums.forget(index)
        return record

    def _make(self, index: int) -> ImatrixRecord:
        sums = self._sums.layer(index)
        factors = {
            path: _factor(self._output, path, inputs.gram, int(inputs.counts.sum()))
            for path, inputs in sums.items()
            if inputs.gram is not None
        }
        tensors: dict[str, Any] = {}
        weights: dict[str, CalibratedWeight] = {}
        coverage: dict[int, list[int]] = {}
        for path, inputs in sums.items():
            importance, thin = importances(inputs.squares, inputs.counts, LEAST_TOKENS)
            # Weights of the same input share a tensor.
            name = path.replace(".up_proj", ".gate_proj")
            tensors[name] = importance
            factor = factors.get(input_name(path))
            weights[path] = CalibratedWeight(
                tensor=name,
                sha256=hashlib.sha256(np.ascontiguousarray(importance).data).hexdigest(),
                units=len(importance),
                thin=thin if ".switch_mlp." in path else 0,
                factor=factor and factor[0],
                factor_sha256=factor and factor[1],
            )
            if path.endswith(".switch_mlp.gate_proj"):
                coverage[index] = inputs.counts.tolist()
        save_arrays(self._importance_path(index), tensors)
        outputs = [FileDigest.of(self._output, name) for name, _ in factors.values()]
        return self._head.model_copy(
            update={"outputs": outputs, "weights": weights, "coverage": coverage}
        )


def _factor(output: Path, path: str, gram: NDArray[np.float64], count: int) -> tuple[str, str]:
    """Write the factor of an input; returns its file and the digest of its values."""
    factor = cholesky_factor(gram, count)
    name = f"{_FACTOR}{path}.safetensors"
    save_arrays(output / name, {"factor": factor})
    return name, hashlib.sha256(factor.data).hexdigest()
