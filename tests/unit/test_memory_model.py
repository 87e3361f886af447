"""The memory model: the release's own numbers, and the runtime's real caches."""

import json
import re
from importlib import import_module
from pathlib import Path

import mlx.core as mx
import pytest
import yaml
from mlx.utils import tree_flatten

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.model.geometry import Geometry
from glm_quant.quantize.plan import make_plan
from glm_quant.recipe import load_recipe, recipe_names
from glm_quant.report.memory import (
    active_params,
    cache_8bit_bytes_per_token,
    indexer_bytes_per_token,
    latent_bytes_per_token,
    machine_bytes,
    machine_fits,
    machines,
    memory_need,
    memory_needs,
)
from tests.synthetic import small_config

ROOT = Path(__file__).parents[2]
WEIGHTS = 237_885_660_672  # dynamic-2.56bpw


@pytest.fixture(scope="module")
def glm(release: Path) -> Geometry:
    """Give the dims of GLM-5.2."""
    return Geometry.from_config(json.loads((release / "config.json").read_text()))


def test_release_caches_are_as_computed_by_hand(glm: Geometry) -> None:
    """78 layers · 576 values, and 21 full layers · 128 values, in 16 bits."""
    assert latent_bytes_per_token(glm) == 78 * 576 * 2 == 89_856
    assert indexer_bytes_per_token(glm) == 21 * 128 * 2 == 5_376
    # A group of 64 takes 64 bytes, a scale and a bias of 2 bytes each: 17/16 of the values.
    assert cache_8bit_bytes_per_token(glm) == (78 * 576 + 21 * 128) * 17 // 16


def test_needs_go_to_the_context_limit(glm: Geometry) -> None:
    """8K to 1M tokens; the peak is weights, both caches and what reading the prompt takes."""
    needs = memory_needs(glm, WEIGHTS, 1 << 20)
    assert [need.context for need in needs] == [8 << 10, 32 << 10, 128 << 10, 1 << 20]
    last = needs[-1]
    assert last.total_bytes == WEIGHTS + (1 << 20) * (89_856 + 5_376) + last.prefill_bytes
    assert 1.2e9 < needs[0].prefill_bytes < last.prefill_bytes < 3e9
    assert [need.context for need in memory_needs(glm, WEIGHTS, 4096)] == [1024, 2048, 4096]


def test_machines_hold_what_fits(glm: Geometry) -> None:
    """256 GB hold the build only with the limit raised; 128 and 192 GB not at all."""
    fits = {fit.gigabytes: fit for fit in machine_fits(glm, WEIGHTS, 1 << 20)}
    assert fits[128].raised == fits[192].raised == 0
    assert fits[256].by_default == 0 < fits[256].raised < (fits[256].raised_8bit or 0)
    assert fits[512].by_default == 1 << 20
    longest = memory_need(glm, WEIGHTS, fits[256].raised)
    more = memory_need(glm, WEIGHTS, fits[256].raised + 256)
    assert longest.total_bytes <= machine_bytes(256) - (8 << 30) < more.total_bytes


def test_facts_of_machines_have_their_source() -> None:
    """What a card says of macOS was said by somebody: a page is named."""
    known = machines()
    assert all(
        source.startswith("github.com/") for source in (known.wired_source, known.wired_seen.source)
    )
    assert known.wired_share <= known.wired_seen.wired / known.wired_seen.gigabytes < 1


def test_active_parameters_of_the_release(glm: Geometry) -> None:
    """8 of 256 experts, everything else but the embedding: 40.3 billion."""
    active = active_params(glm, 743_377_019_904, 724_775_731_200, 951_582_720)
    assert active == pytest.approx(40.3e9, rel=2e-3)


@pytest.mark.parametrize("bits", [16, 8])
def test_runtime_caches_take_what_the_model_says(bits: int) -> None:
    """The caches of the runtime that travels with every build have exactly the computed bytes."""
    config = small_config() | {"kv_lora_rank": 64, "qk_rope_head_dim": 64, "index_head_dim": 64}
    runtime = import_module("glm_quant.model.glm_moe_dsa")
    model = runtime.Model(runtime.ModelArgs.from_dict(config))
    model.set_dtype(mx.bfloat16)
    caches = model.make_cache()
    tokens = 256  # mlx-lm's caches grow by 256 rows
    model(mx.arange(tokens)[None] % config["vocab_size"], cache=caches)
    if bits == 8:
        caches = [cache.to_quantized(group_size=64, bits=8) for cache in caches]
    stored = [tree_flatten([cache.keys, cache.values]) for cache in caches]
    held = sum(array.nbytes for arrays in stored for _, array in arrays)
    need = memory_need(Geometry.from_config(config), 0, tokens)
    wide = need.latent_bytes + need.indexer_bytes
    assert held == (wide if bits == 16 else need.cache_8bit_bytes)


def test_rows_that_are_no_multiple_of_the_group_have_no_8_bit_cache() -> None:
    """`--kv-bits 8` needs groups of 64; the card then says so instead of a number."""
    config = small_config() | {"kv_lora_rank": 64, "qk_rope_head_dim": 32}
    need = memory_need(Geometry.from_config(config), 0, 8)
    assert need.cache_8bit_bytes is None
    assert need.total_8bit_bytes is None


def test_recipes_and_deployments_name_the_machine_that_holds_the_build(release: Path) -> None:
    """A memory that a recipe, or what deploys it, names is the smallest that is sold with room.

    The build needs room for its weights and 32K tokens of context, by the memory model.
    """
    deployments = yaml.safe_load((ROOT / "deployments" / "prefect.yaml").read_text())["deployments"]
    named = [(name, load_recipe(name).description) for name in recipe_names()]
    named += [
        (each["parameters"]["spec"]["recipe"], each["description"])
        for each in deployments
        if "workspace" in each["parameters"].get("spec", {})
    ]
    judged = 0
    for name, text in named:
        if (size := re.search(r"(\d+) GB", text)) is not None:
            plan = make_plan(Checkpoint.open(release), load_recipe(name))
            fits = machine_fits(plan.geometry, plan.tensor_bytes, 32 << 10)
            assert int(size[1]) == min(fit.gigabytes for fit in fits if fit.raised >= 32 << 10)
            judged += 1
    assert judged >= 4
