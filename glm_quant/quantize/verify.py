"""Is a finished output whole? Digests, index against shards against config, no stray shards.

With the source at hand, sampled blocks of weights are made again and compared byte by byte.
"""

import json
import os
import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from glm_quant.architectures.architecture import Architecture, open_architecture
from glm_quant.checkpoint.header import TensorInfo, shorten
from glm_quant.checkpoint.index import INDEX_NAME, parse_index
from glm_quant.checkpoint.manifest import MANIFEST_NAME, Manifest, load_manifest
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.checkpoint.source import Source
from glm_quant.codes.scheme import Quantized, Scheme, Stored, layouts
from glm_quant.errors import CheckpointError, IntegrityError
from glm_quant.litter import entries
from glm_quant.model.geometry import Geometry, is_glm
from glm_quant.model.release import release_weights
from glm_quant.quantize.assemble import output_config, take_census
from glm_quant.quantize.jobs import Job, encode_job, make_jobs
from glm_quant.quantize.layout import tensor_name
from glm_quant.quantize.load import load_parts, read_of
from glm_quant.quantize.plan import Plan, make_plan
from glm_quant.recipe import ComponentGroup, Recipe, Rule


@dataclass(frozen=True)
class Verification:
    """What was looked at: files and bytes read, tensors compared, blocks made again.

    Attributes:
        calibrated: blocks that cannot be made again without the imatrix they were made with.
    """

    files: int
    size_bytes: int
    tensors: int
    rederived_blocks: int
    bits_per_weight: float
    calibrated: int = 0


def verify(
    folder: Path,
    source: str | Path | Source | None = None,
    samples: int = 64,
    imatrix: Path | None = None,
) -> Verification:
    """Check a finished output.

    Args:
        folder: the output.
        source: its source, to make sampled blocks again.
        samples: how many.
        imatrix: folder that the output was calibrated with, where its recipe names none.

    Raises:
        CheckpointError: no manifest, or a header that lies.
        IntegrityError: something is missing, changed, stray, or not what the source gives.
    """
    manifest = load_manifest(folder)
    digests = [shard.file for shard in manifest.shards] + manifest.files
    for digest in digests:
        digest.check(folder)
    tensors = _check_structure(folder, manifest)
    rederived = calibrated = 0
    if source is not None:
        checkpoint = Checkpoint.open(source)
        rederived, calibrated = _rederive(folder, manifest, checkpoint, samples, imatrix)
    return Verification(
        len(digests),
        sum(digest.size_bytes for digest in digests),
        tensors,
        rederived,
        manifest.totals["bits_per_weight"],
        calibrated,
    )


def _check_structure(folder: Path, manifest: Manifest) -> int:
    """Hold index, shard headers, config and manifest against each other."""
    known = {shard.file.path for shard in manifest.shards}
    strays = sorted(
        path.name for path in entries(folder, "*.safetensors") if path.name not in known
    )
    if strays:
        raise IntegrityError(
            f"{folder / strays[0]}: a stray shard ({len(strays)} in all) that the manifest does "
            "not name; loaders would read it. Delete it."
        )
    tensors = Checkpoint.open(folder).tensors
    index = parse_index((folder / INDEX_NAME).read_bytes())
    total = sum(tensor.size_bytes for tensor in tensors.values())
    if total != index.total_size:
        raise IntegrityError(
            f"{folder / INDEX_NAME}: total_size is {index.total_size:,}, the shards hold {total:,} "
            "bytes of tensors. Make the output again."
        )
    _check_config(folder, manifest, tensors)
    recorded = {name for shard in manifest.shards for name in shard.tensors}
    if recorded != set(tensors):
        odd = sorted(recorded ^ set(tensors))[0]
        raise IntegrityError(
            f"{folder}: the manifest accounts for {len(recorded):,} tensors, the shards hold "
            f"{len(tensors):,}; {odd} is in only one of them."
        )
    return len(tensors)


def _check_config(folder: Path, manifest: Manifest, tensors: Mapping[str, TensorInfo]) -> None:
    """Hold config.json against the tensors, and the schemes that both give against the manifest."""
    config = json.loads((folder / "config.json").read_bytes())
    quantized = {
        key for key, value in config.get("quantization", {}).items() if isinstance(value, dict)
    }
    scaled = {name.removesuffix(".scales") for name in tensors if name.endswith(".scales")}
    if quantized != scaled:
        odd = sorted(quantized ^ scaled)[0]
        raise IntegrityError(
            f"{folder / 'config.json'}: `quantization` names {len(quantized):,} modules, the "
            f"shards hold scales for {len(scaled):,}; {odd} is in only one of them."
        )
    census = _check_shapes(folder / "config.json", config, tensors)
    if manifest.census and census != manifest.census:
        group = next(g for g in manifest.census if census.get(g) != manifest.census[g])
        raise IntegrityError(
            f"{folder}: group {group} is stored as {census.get(group)} parameters, the plan was "
            f"{manifest.census[group]}. Make or fetch the output again."
        )


def _check_shapes(
    path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]
) -> dict[str, dict[str, int]]:
    """Hold the shape of every stored tensor against the one that config.json implies.

    Returns:
        The census of how weights are stored: see `Manifest.census`.
    """
    if is_glm(config):
        return take_census(_stored_of_glm(path, config, tensors))
    try:
        architecture = open_architecture(config, tensors.values(), cast=False)
    except CheckpointError as error:
        raise IntegrityError(f"{path}: {error} Make or fetch the output again.") from None
    return take_census(_stored(path, architecture, config))


def _stored_of_glm(
    path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]
) -> list[tuple[ComponentGroup, int, Scheme]]:
    """Return group, parameters and scheme of each weight that GLM's config implies."""
    implied: dict[str, tuple[int, ...]] = {}
    stored: list[tuple[ComponentGroup, int, Scheme]] = []
    for weight in release_weights(Geometry.from_config(config), {}, None):
        entry = config.get("quantization", {}).get(weight.path)
        # Shapes do not depend on the dtype, which config.json does not tell of stored weights.
        scheme = Stored("BF16") if entry is None else _scheme(path, weight.path, entry)
        for layout in layouts(scheme, weight.shape, "BF16"):
            implied[tensor_name(weight, layout)] = layout.shape
        if entry is None and weight.name in tensors:
            scheme = Stored(tensors[weight.name].dtype)
        stored.append((weight.group, weight.params, scheme))
    for name, shape in implied.items():
        if name not in tensors or tensors[name].shape != shape:
            actual = list(tensors[name].shape) if name in tensors else "nowhere"
            raise IntegrityError(
                f"{path}: tensor {name} has shape {actual} in the shards, config.json implies "
                f"{list(shape)}. Make or fetch the output again."
            )
    odd = sorted(tensors.keys() - implied.keys())
    if odd:
        raise IntegrityError(
            f"{path}: tensor {odd[0]} ({len(odd)} in all) is not implied by config.json. Make or "
            "fetch the output again."
        )
    return stored


def _stored(
    path: Path, architecture: Architecture, config: dict[str, Any]
) -> Iterator[tuple[ComponentGroup, int, Scheme]]:
    """Yield group, parameters and scheme of each weight of a build."""
    quantization = config.get("quantization", {})
    for parameter in architecture.parameters:
        entry = quantization.get(parameter.path)
        part = parameter.name.rpartition(".")[2]
        if entry is not None and part == "weight":
            scheme = _scheme(path, parameter.path, entry)
            yield parameter.group, parameter.size * 32 // scheme.bits, scheme
        elif entry is None or part not in ("scales", "biases"):
            yield parameter.group, parameter.size, Stored(parameter.dtype)


def _scheme(path: Path, module: str, entry: dict[str, Any]) -> Quantized:
    try:
        rule = Rule(match=".", **{key: entry[key] for key in ("bits", "group_size", "mode")})
    except (KeyError, TypeError, ValidationError):
        raise IntegrityError(
            f"{path}: the quantization of {module} is {shorten(entry)}, which mlx-lm does not "
            "read. Make or fetch the output again."
        ) from None
    return Quantized(rule.mode, int(rule.bits or 0), rule.group_size)


def _rederive(
    folder: Path, manifest: Manifest, checkpoint: Checkpoint, samples: int, imatrix: Path | None
) -> tuple[int, int]:
    """Make sampled blocks from the source again and compare them with the output's bytes.

    Returns:
        How many, and how many there are that only an imatrix could make.
    """
    try:
        recipe = Recipe.model_validate({**manifest.recipe, "file": MANIFEST_NAME})
    except ValidationError as error:
        raise CheckpointError(
            f"{folder / MANIFEST_NAME}: its recipe cannot be read ({error.errors()[0]['msg']}). "
            "The output was made by another version; verify it without --source."
        ) from None
    # From the recipe in the manifest, not a file: what was made is what is checked.
    plan = make_plan(checkpoint, recipe, imatrix)
    _check_imatrix(folder, manifest, plan)
    if json.loads((folder / "config.json").read_bytes()) != output_config(checkpoint.config, plan):
        raise IntegrityError(
            f"{folder / 'config.json'}: it is not what this source and the manifest's recipe give. "
            "This output was made from another source."
        )
    if [shard.name for shard in plan.shards] != [shard.file.path for shard in manifest.shards]:
        raise IntegrityError(
            f"{folder}: this source and the manifest's recipe give {len(plan.shards)} shards, the "
            f"output has {len(manifest.shards)}. It was made from another source."
        )
    # In blocks of the size that the output was made in.
    every = make_jobs(plan, manifest.block_elements)
    # Without its imatrix, a calibrated block cannot be made again.
    jobs = [job for job in every if not (plan.uncalibrated and _is_calibrated(job))]
    chosen = random.Random(manifest.fingerprint).sample(jobs, min(samples, len(jobs)))  # noqa: S311 - reproducible
    for job in chosen:
        _compare(folder, plan, checkpoint, job)
    return len(chosen), len(every) - len(jobs)


def _check_imatrix(folder: Path, manifest: Manifest, plan: Plan) -> None:
    """Hold the imatrix at hand against the one that the manifest names."""
    if plan.imatrix is None:
        return
    digests = {file.path: file.sha256 for file in plan.imatrix.outputs}
    same = len(digests.items() & manifest.imatrix.items())
    if digests != manifest.imatrix:
        raise IntegrityError(
            f"{folder / MANIFEST_NAME}: the output was made with another imatrix: {same} of its "
            f"{len(manifest.imatrix)} files are among those given. Give the one it was made with."
        )


def _is_calibrated(job: Job) -> bool:
    schemes = [target.weight.scheme for target in job.targets]
    return any(isinstance(s, Quantized) and s.quantizer != "minmax" for s in schemes)


def _compare(folder: Path, plan: Plan, checkpoint: Checkpoint, job: Job) -> None:
    where = f"{checkpoint.index.weight_map[job.source]}: tensor {job.source}"
    loaded = load_parts(job.parts, where, checkpoint, read_of(checkpoint))
    for encoded in encode_job(job, loaded, range(len(plan.shards))):
        for tensor, row, expected in encoded.written:
            path = folder / plan.shards[tensor.shard].name
            offset = tensor.offset + row * tensor.row_bytes
            with path.open("rb") as file:
                stored = os.pread(file.fileno(), expected.size, offset)
            if stored != expected.tobytes():
                raise IntegrityError(
                    f"{path}: tensor {tensor.name}, {expected.size:,} bytes at {offset:,}: "
                    f"the source's {job.source} gives other bytes. The output was made from "
                    "another source or by another version."
                )
