"""Partial outputs: bytes count once journaled, and are looked at before they are published."""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.errors import IntegrityError
from glm_quant.quantize.journal import Entry, Piece
from glm_quant.quantize.layout import PlannedTensor
from glm_quant.quantize.partial import PartialOutputs
from glm_quant.quantize.plan import Plan, make_plan
from glm_quant.recipe import Recipe
from tests.synthetic import small_config


@pytest.fixture
def plan(index_only: Callable[..., Checkpoint], demo_recipe: Recipe) -> Plan:
    return make_plan(index_only(small_config(2, 3)), demo_recipe)


def data_of(tensor: PlannedTensor) -> NDArray[np.uint8]:
    return np.frombuffer(hashlib.shake_128(tensor.name.encode()).digest(tensor.size_bytes), "u1")


def fill(outputs: PartialOutputs, plan: Plan, shard: int, leave: int = 0) -> bytes:
    """Write all tensors of a shard but the last few; return what the file should hold."""
    outputs.open(shard)
    tensors = plan.shards[shard].tensors
    for tensor in reversed(tensors[: len(tensors) - leave]):
        piece = outputs.write(tensor, 0, data_of(tensor))
        outputs.finish_job(Entry(tensor.name, "0" * 64, (piece,)))
    outputs.flush()
    return plan.shards[shard].header + b"".join(data_of(t).tobytes() for t in tensors)


def test_filled_shard_is_published(plan: Plan, tmp_path: Path) -> None:
    """Written in any order, the file is header and tensors; the digests are those of its bytes."""
    outputs = PartialOutputs(tmp_path / "partial", plan.shards, "plan")
    expected = fill(outputs, plan, 1)
    digest, tensors = outputs.check(1)
    outputs.publish(1, tmp_path / "out")
    outputs.close()
    shard = plan.shards[1]
    assert (tmp_path / "out" / shard.name).read_bytes() == expected
    assert digest.sha256 == hashlib.sha256(expected).hexdigest()
    assert tensors == {t.name: hashlib.sha256(data_of(t)).hexdigest() for t in shard.tensors}
    assert not list((tmp_path / "partial").glob("*.part"))


def test_rows_are_placed(plan: Plan, tmp_path: Path) -> None:
    """Rows go to their place in the tensor, and the piece says where that is."""
    tensor = next(t for t in plan.shards[0].tensors if t.size_bytes > 4 * t.row_bytes)
    outputs = PartialOutputs(tmp_path, plan.shards, "plan")
    outputs.open(0)
    rows = np.full(2 * tensor.row_bytes, 7, np.uint8)
    piece = outputs.write(tensor, 1, rows)
    outputs.close()
    content = (tmp_path / f"{plan.shards[0].name}.part").read_bytes()
    begin = tensor.offset + tensor.row_bytes
    assert piece == Piece(tensor.name, 0, begin, rows.size, piece.crc32)
    assert content[begin : begin + rows.size] == rows.tobytes()
    assert len(content) == plan.shards[0].size_bytes


def test_missing_bytes(plan: Plan, tmp_path: Path) -> None:
    """A shard that is not full cannot be finished: tensor and both numbers are named."""
    outputs = PartialOutputs(tmp_path, plan.shards, "plan")
    fill(outputs, plan, 0, leave=1)
    last = plan.shards[0].tensors[-1]
    with pytest.raises(
        IntegrityError, match=f"tensor {last.name} has 0 of {last.size_bytes:,} bytes"
    ):
        outputs.check(0)
    outputs.close()


def test_changed_byte(plan: Plan, tmp_path: Path) -> None:
    """A byte that changed after it was journaled is found; tensor, place and sums are named."""
    outputs = PartialOutputs(tmp_path, plan.shards, "plan")
    fill(outputs, plan, 0)
    tensor = plan.shards[0].tensors[2]
    with (tmp_path / f"{plan.shards[0].name}.part").open("r+b") as file:
        os.pwrite(file.fileno(), bytes([data_of(tensor)[0] ^ 1]), tensor.offset)
    with pytest.raises(
        IntegrityError,
        match=rf"tensor {tensor.name} changed on disk .* CRC-32 \w+ at byte {tensor.offset:,}",
    ):
        outputs.check(0)
    outputs.close()


def test_written_and_not_journaled_does_not_count(plan: Plan, tmp_path: Path) -> None:
    """After a crash before the flush, a job is not done; after it, it is."""
    tensor = plan.shards[0].tensors[0]
    outputs = PartialOutputs(tmp_path, plan.shards, "plan")
    outputs.open(0)
    outputs.finish_job(Entry("job", "0" * 64, (outputs.write(tensor, 0, data_of(tensor)),)))
    assert PartialOutputs(tmp_path / "other", plan.shards, "plan").done == {}
    assert (tmp_path / "journal.jsonl").read_text().count("\n") == 1
    outputs.close()
    again = PartialOutputs(tmp_path, plan.shards, "plan")
    assert set(again.done) == {"job"}
    again.close()


def test_other_plan_discards(plan: Plan, tmp_path: Path) -> None:
    """Partial files of another plan are removed, not mixed in."""
    outputs = PartialOutputs(tmp_path, plan.shards, "one")
    fill(outputs, plan, 0)
    outputs.close()
    other = PartialOutputs(tmp_path, plan.shards, "two")
    assert other.done == {}
    assert not other.is_intact(0)
    assert not list(tmp_path.glob("*.part"))
    other.close()


def test_forget(plan: Plan, tmp_path: Path) -> None:
    """Forgetting a shard drops its file and every job that wrote to it, known or not."""
    outputs = PartialOutputs(tmp_path, plan.shards, "plan")
    fill(outputs, plan, 0)
    fill(outputs, plan, 1)
    outputs.forget(0, set())
    assert set(outputs.done) == {tensor.name for tensor in plan.shards[1].tensors}
    assert not outputs.is_intact(0)
    assert outputs.is_intact(1)
    outputs.close()
