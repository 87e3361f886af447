"""The plan: exact on the real release, and every byte in one place on any geometry."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_quant.checkpoint.header import ITEM_SIZE, header_length, parse_header
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.codes.scheme import Quantized, Stored
from glm_quant.errors import RecipeError
from glm_quant.quantize.jobs import (
    Job,
    check_open_outputs,
    count_open_outputs,
    make_jobs,
    source_order,
)
from glm_quant.quantize.plan import Plan, make_plan
from glm_quant.recipe import load_recipe
from tests.synthetic import small_config

configs = st.builds(
    lambda layers, dense, experts, heads, hidden, vocab: (
        small_config(layers, experts)
        | {
            "first_k_dense_replace": dense,
            "num_attention_heads": heads,
            "hidden_size": hidden,
            "vocab_size": vocab,
        }
    ),
    st.integers(1, 6),
    st.integers(0, 2),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([64, 128, 192]),
    st.integers(1, 300),
)


@pytest.fixture(scope="module")
def release_plan(release: Path) -> Plan:
    return make_plan(Checkpoint.open(release), load_recipe("dynamic-2.56bpw"))


def test_size_of_the_2_56_build(release_plan: Plan) -> None:
    """GLM-5.2 under dynamic-2.56bpw has exactly the figures of facts §6.2."""
    assert release_plan.tensor_bytes == 237_885_660_672
    assert round(release_plan.bits_per_weight, 5) == 2.56005
    assert release_plan.params == 743_377_019_904
    assert sum(1 for _ in release_plan.tensors) == 3_355
    assert len(release_plan.shards) == 46


def test_tensors_of_the_2_56_build(
    release_plan: Plan, release_tensors: dict[str, tuple[tuple[int, ...], str]]
) -> None:
    """Names, shapes and dtypes are exactly the listed ones."""
    found = {tensor.name: (tensor.shape, tensor.dtype) for tensor in release_plan.tensors}
    assert len(release_tensors) == 3_355
    assert found == release_tensors
    indexer = {dtype for name, (_, dtype) in found.items() if ".indexer." in name}
    assert indexer == {"F16"}


def test_groups_of_the_2_56_build(release_plan: Plan) -> None:
    """Each group has the parameters, bytes and scheme of facts §6.1 and §6.2."""
    found = {t.group: (t.params, t.size_bytes, list(t.schemes)) for t in release_plan.groups()}
    assert found == {
        "routed_experts": (724_775_731_200, 226_492_416_000, ["2-bit g64 gptq"]),
        "attention": (12_871_532_544, 7_240_237_056, ["4-bit g64 gptq"]),
        "shared_experts": (2_831_155_200, 1_592_524_800, ["4-bit g64 gptq"]),
        "dense_mlp": (679_477_248, 382_205_952, ["4-bit g64 gptq"]),
        "embeddings": (951_582_720, 773_160_960, ["6-bit g64 gptq"]),
        "lm_head": (951_582_720, 773_160_960, ["6-bit g64 gptq"]),
        "router": (117_984_000, 235_929_600 + 76_800, ["bf16", "f32"]),
        "indexer": (196_809_984, 393_619_968, ["f16"]),
        "norms": (1_164_288, 2_328_576, ["bf16"]),
    }


def test_mtp_is_dropped(release_plan: Plan, release: Path) -> None:
    """The 791 tensors of layer 78 are dropped and nothing of them is planned."""
    names = Checkpoint.open(release).index.weight_map
    assert set(release_plan.dropped) == {n for n in names if n.startswith("model.layers.78.")}
    assert len(release_plan.dropped) == 791
    assert not any(".layers.78." in tensor.name for tensor in release_plan.tensors)


def test_size_of_the_3_5_build(release: Path) -> None:
    """With experts in 3 bits the build has 328.48 GB and 3.535 bits per weight."""
    plan = make_plan(Checkpoint.open(release), load_recipe("dynamic-3.5bpw"))
    assert round(plan.tensor_bytes / 1e9, 2) == 328.48
    assert round(plan.bits_per_weight, 3) == 3.535


def test_layout_of_the_2_56_build(release_plan: Plan) -> None:
    """Shards of at most 5 GiB; every tensor in one, contiguous, aligned, as the header says."""
    check_layout(release_plan, 5 << 30)
    assert release_plan.shards[0].name == "model-00001-of-00046.safetensors"


def test_jobs_of_the_2_56_build(release_plan: Plan) -> None:
    """The jobs of the real build write every one of its 237,885,660,672 bytes exactly once."""
    jobs = make_jobs(release_plan)
    assert written_once(release_plan, jobs) == 237_885_660_672
    assert max(job.size_bytes for job in jobs) <= 2 << 24


@settings(max_examples=8)
@given(configs, st.integers(1 << 16, 1 << 20), st.integers(1 << 9, 1 << 15))
def test_any_plan_places_every_byte_once(
    index_only: Callable[..., Checkpoint],
    config: dict[str, Any],
    shard_bytes: int,
    block_elements: int,
) -> None:
    """On any geometry: each tensor in exactly one shard, each byte written by exactly one job."""
    recipe = load_recipe("demo")
    sparse = config["first_k_dense_replace"] < config["num_hidden_layers"]
    rules = tuple(r for r in recipe.rules if sparse or r.group not in ("routed_experts", "router"))
    recipe = recipe.model_copy(update={"shard_bytes": shard_bytes, "rules": rules})
    plan = make_plan(index_only(config, 5), recipe)
    check_layout(plan, shard_bytes)
    jobs = make_jobs(plan, block_elements)
    assert written_once(plan, jobs) == plan.tensor_bytes
    assert len({job.key for job in jobs}) == len(jobs)
    sources = {segment.source for planned in plan.weights for segment in planned.weight.segments}
    assert {job.source for job in jobs} == sources


def test_order_of_the_index_does_not_matter(index_only: Callable[..., Checkpoint]) -> None:
    """The same checkpoint with its index in another order gives the same plan."""
    checkpoint = index_only(small_config(), 5)
    before = make_plan(checkpoint, load_recipe("demo"))
    names = checkpoint.index.weight_map
    turned = dict(reversed(names.items()))
    names.clear()
    names.update(turned)
    assert make_plan(checkpoint, load_recipe("demo")).shards == before.shards


def test_schemes_of_a_plan(index_only: Callable[..., Checkpoint]) -> None:
    """The router's bias stays F32 whatever the rule says; what has bits has scales and biases."""
    plan = make_plan(index_only(small_config()), load_recipe("demo"))
    for planned in plan.weights:
        suffixes = [tensor.name.rpartition(".")[2] for tensor in planned.tensors]
        if isinstance(planned.scheme, Quantized):
            assert suffixes == ["weight", "scales", "biases"]
        else:
            assert suffixes == [planned.weight.name.rpartition(".")[2]]
        if planned.weight.name.endswith("e_score_correction_bias"):
            assert planned.scheme == Stored("F32")


def check_layout(plan: Plan, shard_bytes: int) -> None:
    names = [tensor.name for tensor in plan.tensors]
    assert len(names) == len(set(names))
    assert sorted(names) == sorted(t.name for p in plan.weights for t in p.tensors)
    for number, shard in enumerate(plan.shards):
        payload = sum(tensor.size_bytes for tensor in shard.tensors)
        assert payload <= shard_bytes or len(shard.tensors) == 1
        length = header_length(shard.header[:8], shard.name, shard.size_bytes)
        assert 8 + length == len(shard.header)
        assert len(shard.header) % 8 == 0
        read = parse_header(shard.header[8:], shard.name, shard.size_bytes)
        assert json.loads(shard.header[8:])["__metadata__"] == {"format": "mlx"}
        offset = len(shard.header)
        for tensor in shard.tensors:
            info = read[tensor.name]
            assert tensor.shard == number
            assert (info.begin, info.end) == (tensor.offset, tensor.offset + tensor.size_bytes)
            assert (info.dtype, info.shape) == (tensor.dtype, tensor.shape)
            assert tensor.offset == offset
            assert tensor.offset % ITEM_SIZE[tensor.dtype] == 0
            offset += tensor.size_bytes


def written_once(plan: Plan, jobs: list[Job]) -> int:
    """Return how many bytes the jobs write; fails if one is written twice or left out."""
    spans: dict[str, list[tuple[int, int]]] = {tensor.name: [] for tensor in plan.tensors}
    for job in jobs:
        for target in job.targets:
            rows = (target.end - target.begin) * target.segment.unit_rows
            for tensor in target.weight.tensors:
                begin = target.first_row * tensor.row_bytes
                spans[tensor.name].append((begin, begin + rows * tensor.row_bytes))
    total = 0
    for tensor in plan.tensors:
        edge = 0
        for begin, end in sorted(spans[tensor.name]):
            assert begin == edge
            edge = end
        assert edge == tensor.size_bytes == math.prod(tensor.shape) * ITEM_SIZE[tensor.dtype]
        total += edge
    return total


def test_few_outputs_are_open(release: Path) -> None:
    """GLM-5.2's outputs fill in order: three at most are open, and 3 of 282 shards are not read."""
    checkpoint = Checkpoint.open(release)
    plan = make_plan(checkpoint, load_recipe("dynamic-2.56bpw"))
    jobs, weight_map = make_jobs(plan), checkpoint.index.weight_map
    assert count_open_outputs(jobs, weight_map) == 3
    order = source_order(jobs, weight_map)
    assert len(order) == 279
    assert list(order) == sorted(order)


def test_too_many_open_outputs() -> None:
    """A plan whose outputs would all be open at a time is refused, with the way out."""
    with pytest.raises(RecipeError, match=r"65 output shards would be open .* at most 64"):
        check_open_outputs(65)
