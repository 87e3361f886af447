"""The streamed bytes are those of the whole-model path: runtime's sanitize, mlx-lm's quantize.

The reference here holds the whole model in memory and knows nothing of plans, jobs or offsets.
"""

import hashlib
import json
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes import encode
from glm_quant.data import tiny_glm_path
from glm_quant.model.glm_moe_dsa import Model, ModelArgs
from glm_quant.quantize import outputs
from glm_quant.quantize.jobs import Job, make_jobs
from glm_quant.quantize.plan import Plan
from glm_quant.quantize.verify import verify
from glm_quant.recipe import Recipe, load_recipe, parse_recipe
from tests.synthetic import small_config, write_checkpoint

from ..conftest import Made, with_quantizer

MIXED = """\
name: mixed
description: every width and format in one build
shard_bytes: 200_000
rules:
  - group: mtp
    drop: true
  - match: switch_mlp\\.down_proj
    bits: 3
    group_size: 32
  - match: switch_mlp\\.up_proj
    mode: mxfp4
    bits: 4
    group_size: 32
  - match: switch_mlp\\.gate_proj
    mode: nvfp4
    bits: 4
    group_size: 16
  - group: shared_experts
    mode: mxfp8
    bits: 8
    group_size: 32
  - match: unembed_out
    bits: 8
    group_size: 32
  - match: embed_q
    bits: 5
    group_size: 64
  - group: [attention, dense_mlp, lm_head]
    bits: 2
    group_size: 64
  - group: embeddings
    bits: 6
    group_size: 128
  - match: indexer\\.wk$
    bits: 8
    group_size: 128
  - group: [indexer, norms, router]
    dtype: float32
"""

# One shard of `pinned_build`. It changes when output bytes change: then raise encode.VERSION, so
# that builds of the old version are made again, and pin the new digest.
PINNED_VERSION = 2
PINNED_SHA256 = "088f0dd850df4ef146539cea103cbad3d5ed6e8674ff8841a687f6a042b2f065"


def shipped(name: str) -> Recipe:
    """A recipe that ships, with mlx-lm's own quantizer."""
    recipe = load_recipe(name).model_copy(update={"shard_bytes": 400_000})
    return with_quantizer(recipe, "minmax")


@pytest.fixture(scope="module")
def tiny() -> Path:
    return tiny_glm_path()


@pytest.mark.parametrize("name", ["demo", "dynamic-2.56bpw", "dynamic-3.5bpw", "uniform-4bit"])
@pytest.mark.parametrize("source", ["small", "tiny"])
def test_every_tensor_equals_the_whole_model_path(
    source: str,
    name: str,
    tmp_path: Path,
    prepare: Callable[..., Made],
    request: pytest.FixtureRequest,
) -> None:
    """Names, shapes, dtypes and bytes of every tensor are those of mlx-lm's own quantization."""
    check_equal(prepare(request.getfixturevalue(source), tmp_path, shipped(name), 2))


def test_every_format_equals_the_whole_model_path(
    small: Path, tmp_path: Path, prepare: Callable[..., Made]
) -> None:
    """The same for 2, 3, 5, 6 and 8 bits, every group size, mxfp4, nvfp4, mxfp8 and casts."""
    check_equal(prepare(small, tmp_path, parse_recipe(MIXED, "mixed.yaml"), 2))


def check_equal(made: Made) -> None:
    made.complete_all()
    made.assemble()
    assert len(made.plan.shards) > 2
    assert verify(made.output).tensors == sum(1 for _ in made.plan.tensors)
    config = json.loads((made.output / "config.json").read_bytes())
    expected = whole_model(made.checkpoint, config["quantization"], made.recipe)
    found = {k: v for path in made.shard_files for k, v in stored(path).items()}
    assert set(found) == set(expected)
    different = [name for name in expected if not same(found[name], expected[name])]
    assert different == []


def stored(path: Path) -> dict[str, mx.array]:
    with mx.stream(mx.cpu):
        loaded = mx.load(str(path))
    assert isinstance(loaded, dict)
    return loaded


def same(a: mx.array, b: mx.array) -> bool:
    return (a.dtype, a.shape) == (b.dtype, b.shape) and raw(a) == raw(b)


def raw(array: mx.array) -> bytes:
    with mx.stream(mx.cpu):
        return np.asarray(mx.contiguous(array).view(mx.uint8)).tobytes()


def whole_model(
    checkpoint: Checkpoint, quantization: dict[str, Any], recipe: Recipe
) -> dict[str, mx.array]:
    """Load everything, let the runtime restructure it and mlx-lm quantize it."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    try:
        model = Model(ModelArgs.from_dict(checkpoint.config))
        weights: dict[str, mx.array] = {}
        for shard in checkpoint.index.shards:
            weights |= stored(checkpoint.source.acquire(shard))
        weights = model.sanitize(weights)
        for name in weights:
            weights[name] = cast_as_written(name, weights[name], recipe, quantization)
        model.load_weights(list(weights.items()), strict=True)
        model, _ = quantize_model(
            model,
            {},
            64,
            4,
            quant_predicate=lambda path, _: quantization.get(path, False),
        )
        parameters: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
        mx.eval(parameters)
    finally:
        mx.set_default_device(device)
    return parameters


def cast_as_written(
    name: str, weight: mx.array, recipe: Recipe, quantization: dict[str, Any]
) -> mx.array:
    """Cast what the recipes cast: the indexer to float16 (mixed: all that is not quantized)."""
    if name.rpartition(".")[0] in quantization or name.endswith("e_score_correction_bias"):
        return weight
    if recipe.name == "mixed":
        return weight.astype(mx.float32)
    if ".indexer." in name and recipe.name != "uniform-4bit":
        return weight.astype(mx.float16)
    return weight


def digests(made: Made) -> dict[str, str]:
    made.complete_all()
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in made.shard_files}


def shuffled_jobs(plan: Plan) -> list[Job]:
    jobs = make_jobs(plan, 4096)
    random.Random(7).shuffle(jobs)
    return jobs


@pytest.mark.parametrize(
    ("workers", "jobs"),
    [
        (2, partial(make_jobs, block_elements=2000)),
        (4, make_jobs),
        (2, shuffled_jobs),
    ],
    ids=["blocks of 2,000 and two workers", "four workers", "any order"],
)
@pytest.mark.parametrize("quantizer", ["minmax", "search"])
def test_bytes_do_not_depend_on_how(
    quantizer: str,
    workers: int,
    jobs: Callable[[Plan], list[Job]],
    small: Path,
    tmp_path: Path,
    demo_recipe: Recipe,
    prepare: Callable[..., Made],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Number of workers, size of blocks and order of jobs leave every shard's sha256 the same."""
    demo_recipe = with_quantizer(demo_recipe, quantizer)
    expected = digests(prepare(small, tmp_path / "plain", demo_recipe, 1))
    monkeypatch.setattr(outputs, "make_jobs", jobs)
    assert digests(prepare(small, tmp_path / "other", demo_recipe, workers)) == expected


def test_pinned_bytes(tmp_path: Path, demo_recipe: Recipe, prepare: Callable[..., Made]) -> None:
    """The bytes of a tiny build are pinned to the encoder's VERSION."""
    source = tmp_path / "source"
    write_checkpoint(source, small_config(layers=2, experts=3), shard_bytes=100_000)
    write_hashed_values(source)
    made = digests(prepare(source, tmp_path / "work", with_quantizer(demo_recipe, "minmax")))
    together = hashlib.sha256("".join(made.values()).encode()).hexdigest()
    assert (encode.VERSION, together) == (PINNED_VERSION, PINNED_SHA256), (
        "output bytes changed: raise encode.VERSION and pin both"
    )


def write_hashed_values(folder: Path) -> None:
    """Give every tensor values that follow from its name alone, on any machine and numpy."""
    for info in Checkpoint.open(folder).tensors.values():
        count = info.size_bytes // (4 if info.dtype == "F32" else 2)
        noise = np.frombuffer(hashlib.shake_128(info.name.encode()).digest(2 * count), "<u2")
        # bfloat16 with any sign and mantissa, between 2**-7 and 2**-3
        values = (noise & 0x807F) | (0x3C00 + ((noise >> 7) & 3) * 0x80).astype(np.uint16)
        data = values.astype("<u2").tobytes()
        if info.dtype == "F32":
            data = (values.astype("<u4") << 16).tobytes()
        with (folder / info.shard).open("r+b") as file:
            file.seek(info.begin)
            file.write(data)
