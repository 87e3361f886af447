"""An imatrix as llama.cpp keeps it, read into a folder of ours and written from one.

`llama-imatrix` writes a GGUF file with two float32 tensors for each weight: `NAME.in_sum2` holds
Σx² [units, width], `NAME.counts` the tokens that each unit met [units, 1]; units are experts or
heads. The names are those that llama.cpp gives GLM (its architecture `glm-dsa`). Of our importance
only the proportions within a unit are known, so what is written
has mean 1 for each token; llama.cpp too uses nothing but the proportions.
"""

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray

from glm_quant.artifact import FileDigest, publish_file, sha256_file, sync_file
from glm_quant.calibration.calibrate import LEAST_TOKENS
from glm_quant.calibration.hessian import importances
from glm_quant.calibration.observe import input_name
from glm_quant.checkpoint.imatrix import (
    RECORD_NAME,
    TENSORS_NAME,
    CalibratedWeight,
    Imatrix,
    ImatrixRecord,
)
from glm_quant.errors import IntegrityError, OutputError, RecipeError
from glm_quant.fingerprint import fingerprint
from glm_quant.litter import entries
from glm_quant.streaming.activations import save_arrays

# Raise it when what is read from a file changes.
VERSION = 1
# MLX module in a layer: the weight of a block that meets the same input.
_NAMES = {
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.embed_q": "attn_k_b",
    "self_attn.unembed_out": "attn_v_b",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.switch_mlp.gate_proj": "ffn_gate_exps",
    "mlp.switch_mlp.up_proj": "ffn_up_exps",
    "mlp.switch_mlp.down_proj": "ffn_down_exps",
}
_MODULES = {name: module for module, name in _NAMES.items()}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight\.in_sum2")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")

Sums = tuple[NDArray[np.float64], NDArray[np.int64]]


def read_llama_cpp(file: Path, output: Path) -> ImatrixRecord:
    """Make an imatrix folder from a file of llama.cpp's.

    Args:
        file: as `llama-imatrix` writes it.
        output: folder to make; weights that the file does not name go without importance.

    Raises:
        RecipeError: it is no such file, or names no weight of GLM.
        IntegrityError: it holds what no sum of squares can be.
        OutputError: the folder holds something else.
    """
    output = output.expanduser().absolute()
    if strangers := entries(output):
        raise OutputError(
            f"{output}: the folder holds something ({strangers[0].name}). Choose an empty one."
        )
    sums, tokens = _sums_of(file)
    digest = sha256_file(file)
    tensors: dict[str, Any] = {}
    weights: dict[str, CalibratedWeight] = {}
    coverage: dict[int, list[int]] = {}
    for path in sorted(sums):
        # What meets the same input shares a tensor, where the file has it.
        shared = input_name(path) if input_name(path) in sums else path
        importance, thin = importances(*sums[shared], LEAST_TOKENS)
        tensors[shared] = importance
        weights[path] = CalibratedWeight(
            tensor=shared,
            sha256=hashlib.sha256(importance.data).hexdigest(),
            units=len(importance),
            thin=thin,
        )
        if path.endswith(".switch_mlp.gate_proj"):
            coverage[int(path.split(".")[2])] = sums[path][1].tolist()
    output.mkdir(parents=True, exist_ok=True)
    save_arrays(output / TENSORS_NAME, tensors)
    record = ImatrixRecord(
        fingerprint=fingerprint({"version": VERSION, "llama_cpp": digest}),
        outputs=[FileDigest.of(output, TENSORS_NAME)],
        source=str(file),
        tokens=tokens,
        tokens_sha256=digest,
        least_tokens=LEAST_TOKENS,
        weights=weights,
        coverage=coverage,
    )
    record.save(output / RECORD_NAME)
    return record


def write_llama_cpp(folder: Path, file: Path) -> int:
    """Write an imatrix folder as a file for llama.cpp; returns the number of its weights.

    Raises:
        RecipeError: the folder holds no imatrix.
        IntegrityError: its bytes are not those that were recorded.
        OutputError: the file is there already.
    """
    if file.exists():
        raise OutputError(f"{file}: the file is there already. Move it, or choose another name.")
    imatrix = Imatrix.open(folder)
    record = imatrix.record
    temporary = file.with_name(f".{file.name}.{os.getpid()}.part")
    writer = _Writer(temporary, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [f"glm-quant calibrate: tokens {record.tokens_sha256}"])
    writer.add_uint32("imatrix.chunk_count", 1)
    writer.add_uint32("imatrix.chunk_size", record.tokens)
    for path, weight in record.weights.items():
        layer, module = _layer_and_module(path)
        importance = imatrix.importance(path)
        if importance is None or module not in _NAMES:
            continue
        values = importance.of_rows(0, weight.units, weight.units)
        counts = np.full((weight.units, 1), record.tokens, np.float32)
        if module.startswith("mlp.switch_mlp.") and layer in record.coverage:
            # An expert that met nothing has its layer's mean: none is empty.
            counts[:, 0] = np.maximum(record.coverage[layer], 1)
        if module == "self_attn.unembed_out":
            heads = record.weights[f"model.layers.{layer}.self_attn.embed_q"].units
            values, counts = (np.repeat(a, heads // weight.units, 0) for a in (values, counts))
        name = f"blk.{layer}.{_NAMES[module]}.weight"
        writer.add_tensor(f"{name}.in_sum2", np.ascontiguousarray(values * counts))
        writer.add_tensor(f"{name}.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with temporary.open("rb+") as written:
        sync_file(written.fileno())
    publish_file(temporary, file)
    return len(writer.tensors[0]) // 2


class _Writer(GGUFWriter):
    """Writes no architecture: an imatrix has none."""

    def add_architecture(self) -> None:
        """Add nothing."""


def _layer_and_module(path: str) -> tuple[int, str]:
    match = _LAYER.fullmatch(path)
    return (int(match[1]), match[2]) if match else (-1, path)


def _sums_of(file: Path) -> tuple[dict[str, Sums], int]:
    """Return Σx² and counts by MLX module path, and how many tokens passed."""
    try:
        reader = GGUFReader(file)
        kind = reader.fields["general.type"].contents()
        tokens = int(reader.fields["imatrix.chunk_count"].contents()) * int(
            reader.fields["imatrix.chunk_size"].contents()
        )
        arrays = {tensor.name: tensor.data for tensor in reader.tensors}
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise _not_one(file, f"{type(error).__name__}: {error}") from None
    if kind != "imatrix":
        raise _not_one(file, f"general.type is {kind}")
    sums: dict[str, Sums] = {}
    for name, squares in arrays.items():
        match = _BLOCK.fullmatch(name)
        module = _MODULES.get(match[2]) if match else None
        if match and module:
            counts = arrays.get(f"{name.removesuffix('.in_sum2')}.counts")
            sums[f"model.layers.{match[1]}.{module}"] = _checked(file, name, squares, counts)
    if not sums:
        raise _not_one(file, f"none of its {len(arrays):,} tensors is a sum of a weight of GLM's")
    return sums, tokens


def _checked(file: Path, name: str, squares: Any, counts: Any) -> Sums:
    if counts is None or squares.dtype != np.float32 or counts.dtype != np.float32:
        raise _not_one(file, f"{name} has no counts in float32 beside it")
    if squares.ndim != 2 or counts.size != len(squares):
        raise _not_one(file, f"{name} has shape {squares.shape} for {counts.size:,} counts")
    for values in (squares, counts):
        if not np.isfinite(values).all() or values.min(initial=0) < 0:
            raise IntegrityError(
                f"{file}: {name} or its counts hold NaN, Inf or a number below 0. Fetch or make "
                "the file again."
            )
    return squares.astype(np.float64), counts.reshape(-1).astype(np.int64)


def _not_one(file: Path, why: str) -> RecipeError:
    return RecipeError(
        f"{file}: this is no imatrix of llama.cpp in GGUF ({why}). Give a file that "
        "`llama-imatrix` wrote; it turns an older one into GGUF with `--in-file OLD.dat "
        "--output-format gguf`."
    )
