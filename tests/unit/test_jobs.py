"""Jobs: small enough for memory, whole units, each with a name of its own.

That they cover every byte exactly once is in test_plan.py, on the real plan and on any.
"""

from collections.abc import Callable
from pathlib import Path

import pytest

from glm_quant.architectures.segments import unit_elements
from glm_quant.architectures.weights import OutputWeight
from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.quantize.jobs import by_source_shard, make_jobs
from glm_quant.quantize.plan import make_plan
from glm_quant.recipe import load_recipe
from tests.synthetic import small_config


@pytest.mark.parametrize("block", [1, 1000, 1 << 24])
def test_jobs_are_blocks_of_whole_units(block: int, index_only: Callable[..., Checkpoint]) -> None:
    """No job reads more than a block, or one unit where that is larger; heads are never cut."""
    plan = make_plan(index_only(small_config()), load_recipe("demo"))
    jobs = make_jobs(plan, block)
    assert len({job.key for job in jobs}) == len(jobs)
    for job in jobs:
        elements = [
            (target.end - target.begin) * unit_elements(target.segment) for target in job.targets
        ]
        one_unit = sum(unit_elements(target.segment) for target in job.targets)
        assert all(target.end > target.begin for target in job.targets)
        assert sum(elements) <= max(block, one_unit)


def test_kv_b_feeds_two_outputs(index_only: Callable[..., Checkpoint]) -> None:
    """kv_b_proj is read once for both of its outputs."""
    plan = make_plan(index_only(small_config()), load_recipe("demo"))
    jobs = [j for j in make_jobs(plan) if j.source == "model.layers.0.self_attn.kv_b_proj.weight"]
    assert len(jobs) == 1
    names: list[OutputWeight] = [target.weight.weight for target in jobs[0].targets]
    assert {weight.path.rpartition(".")[2] for weight in names} == {"embed_q", "unembed_out"}


def test_each_source_shard_is_passed_once(index_only: Callable[..., Checkpoint]) -> None:
    """Grouped by source shard, in stored order, no job is lost."""
    checkpoint = index_only(small_config(), 5)
    jobs = make_jobs(make_plan(checkpoint, load_recipe("demo")))
    grouped = by_source_shard(jobs, checkpoint.index.weight_map)
    assert list(grouped) == sorted(grouped)
    assert sorted(j.key for js in grouped.values() for j in js) == sorted(j.key for j in jobs)


def test_mtp_shards_of_the_release_are_not_read(release: Path) -> None:
    """Dropping MTP saves the three source shards that hold nothing else (facts §2.2)."""
    checkpoint = Checkpoint.open(release)
    jobs = make_jobs(make_plan(checkpoint, load_recipe("dynamic-2.56bpw")))
    unread = set(checkpoint.index.shards) - set(by_source_shard(jobs, checkpoint.index.weight_map))
    assert unread == {f"model-{number:05d}-of-00282.safetensors" for number in (271, 272, 273)}
