"""Everything of an output but its weights: config, index, tokenizer, runtime, manifest.

The manifest comes last: where it stands, the output is whole.
"""

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from glm_quant import __version__
from glm_quant.artifact import TEMPORARY_NAME, FileDigest, full_disk_named, write_atomic
from glm_quant.checkpoint.index import INDEX_NAME
from glm_quant.checkpoint.manifest import Manifest, ManifestShard
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.scheme import Quantized, Scheme
from glm_quant.errors import RunError
from glm_quant.fingerprint import fingerprint
from glm_quant.litter import entries
from glm_quant.quantize.convert import Conversion, ShardRecord
from glm_quant.quantize.jobs import BLOCK_ELEMENTS
from glm_quant.quantize.plan import Plan
from glm_quant.recipe import ComponentGroup, Recipe
from glm_quant.workspace import SHARD_NAME

RUNTIME_NAME = "glm_moe_dsa.py"

# Files that come along as they are. Code from a source is never among them.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
    "LICENSE",
    "NOTICE",
)


def output_config(source_config: dict[str, Any], plan: Plan) -> dict[str, Any]:
    """Return config.json of the output.

    `quantization` names every quantized module by its path, as mlx-lm reads it; its top level is
    the scheme that most parameters have, which is what the Hub shows as a badge.
    """
    packed = plan.architecture.packed if plan.architecture else {}
    per_path: dict[str, dict[str, Any]] = packed | {
        planned.weight.path: planned.scheme.config()
        for planned in plan.weights
        if isinstance(planned.scheme, Quantized)
    }
    params = Counter[Quantized]()
    for planned in plan.weights:
        if isinstance(planned.scheme, Quantized):
            params[planned.scheme] += planned.weight.params
    config = {
        key: value
        for key, value in source_config.items()
        if key not in ("quantization", "quantization_config")
    }
    if plan.geometry is not None:
        config |= _runtime_keys(config)
    if per_path:
        common = params.most_common(1)[0][0].config() if params else next(iter(per_path.values()))
        quantization = {**common, **per_path}
        config |= {"quantization": quantization, "quantization_config": quantization}
    return config


def _runtime_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Return the keys that GLM's runtime file, which travels along, reads."""
    interleaved = bool(config.get("indexer_rope_interleave", True))
    return {
        "model_file": RUNTIME_NAME,
        # transformers builds the indexer's LayerNorm with this eps and has no key for it.
        "indexer_norm_eps": 1e-6,
        "indexer_rope_interleave": interleaved,
        # The name that other MLX loaders use for the same thing.
        "indexer_rope_traditional": interleaved,
    }


def assemble(
    conversion: Conversion, checkpoint: Checkpoint, recipe: Recipe, folder: Path
) -> Manifest:
    """Complete an output whose shards are all finished.

    Args:
        conversion: supplies the plan and the shards' records.
        checkpoint: the source, for config and tokenizer.
        recipe: stands in the manifest.
        folder: the output.

    Raises:
        RunError: a shard is not finished.
        DiskSpaceError: the disk is full.
    """
    with full_disk_named(folder):
        return _assemble(conversion, checkpoint, recipe, folder)


def _assemble(
    conversion: Conversion, checkpoint: Checkpoint, recipe: Recipe, folder: Path
) -> Manifest:
    plan = conversion.plan
    records = [_finished(conversion, shard) for shard in range(len(plan.shards))]
    written = [
        *_copy_companions(checkpoint, folder),
        _write_json(folder, "config.json", output_config(checkpoint.config, plan)),
        _write_json(folder, INDEX_NAME, _index(plan)),
    ]
    if plan.geometry is not None:
        runtime = files("glm_quant.model").joinpath(RUNTIME_NAME).read_bytes()
        written.append(_write(folder, RUNTIME_NAME, runtime))
    # Before the manifest: with it, what stands in the folder is the build.
    _remove_strays(folder, {shard.name for shard in plan.shards})
    source_shards = sorted({name for record in records for name in record.inputs.sources})
    manifest = Manifest(
        fingerprint=fingerprint([record.outputs[0].sha256 for record in records]),
        source=source_label(checkpoint),
        source_files={
            name: {
                "size_bytes": checkpoint.files[name].size_bytes,
                "sha256": checkpoint.files[name].sha256,
            }
            for name in source_shards
        },
        recipe=recipe.model_dump(mode="json"),
        versions={"glm-quant": __version__, "mlx": version("mlx")},
        totals=_totals(plan),
        census=take_census((p.weight.group, p.weight.params, p.scheme) for p in plan.weights),
        block_elements=BLOCK_ELEMENTS,
        imatrix={file.path: file.sha256 for file in plan.imatrix.outputs} if plan.imatrix else {},
        shards=[
            ManifestShard(file=r.outputs[0], tensors=r.tensors, sources=r.sources) for r in records
        ],
        files=sorted(written, key=lambda digest: digest.path),
    )
    manifest.save(folder)
    return manifest


def _totals(plan: Plan) -> dict[str, float]:
    return {
        "params": plan.params,
        "tensor_bytes": plan.tensor_bytes,
        "tensors": sum(1 for _ in plan.tensors),
        "bits_per_weight": plan.bits_per_weight,
    }


def take_census(
    weights: Iterable[tuple[ComponentGroup, int, Scheme]],
) -> dict[str, dict[str, int]]:
    """Return the parameters of each component group by how they are stored.

    Args:
        weights: group, parameters and scheme of each.
    """
    census: dict[str, dict[str, int]] = {}
    for group, params, scheme in weights:
        # The quantizer changes values, not the layout, and config.json does not tell it.
        layout = replace(scheme, quantizer="minmax") if isinstance(scheme, Quantized) else scheme
        schemes = census.setdefault(group, {})
        schemes[layout.describe()] = schemes.get(layout.describe(), 0) + params
    return census


def source_label(checkpoint: Checkpoint) -> str:
    """Return what an output says of its source: a URI, or a folder's name without its path."""
    uri = checkpoint.source.uri
    return uri if "://" in uri else Path(uri).name


def _finished(conversion: Conversion, shard: int) -> ShardRecord:
    record = conversion.outputs.finished(shard)
    if record is None:
        raise RunError(
            f"{conversion.plan.shards[shard].name}: the shard is not finished; run again."
        )
    return record


def _remove_strays(folder: Path, planned: set[str]) -> None:
    """Remove what an earlier plan or a killed run of ours left in the output."""
    for path in entries(folder, "model*.safetensors"):
        if path.name not in planned and SHARD_NAME.fullmatch(path.name):
            path.unlink()  # loaders take every model*.safetensors
    for path in entries(folder, ".*.part"):
        if TEMPORARY_NAME.fullmatch(path.name):
            path.unlink()


def _index(plan: Plan) -> dict[str, Any]:
    weight_map = {tensor.name: plan.shards[tensor.shard].name for tensor in plan.tensors}
    return {
        "metadata": {"total_size": plan.tensor_bytes, "total_parameters": plan.params},
        "weight_map": dict(sorted(weight_map.items())),
    }


def _copy_companions(checkpoint: Checkpoint, folder: Path) -> list[FileDigest]:
    return [
        _write(folder, name, checkpoint.source.read(name))
        for name in COMPANIONS
        if name in checkpoint.files
    ]


def _write_json(folder: Path, name: str, value: dict[str, Any]) -> FileDigest:
    return _write(folder, name, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def _write(folder: Path, name: str, data: bytes) -> FileDigest:
    path = folder / name
    # Left alone where it is the same: a second run must not look like a change.
    if not (path.is_file() and path.read_bytes() == data):
        write_atomic(path, data)
    return FileDigest.of(folder, name)
