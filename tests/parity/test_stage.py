"""The parity stage: its record, its bounds, and that streaming equals the whole model."""

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.checkpoint.spool import SpooledSource
from glm_quant.errors import CheckpointError, ParityError, RecipeError
from glm_quant.hub.huggingface import HubSource
from glm_quant.parity import candidate, reference
from glm_quant.parity.candidate import load_candidate, load_unquantized, logits_of
from glm_quant.parity.check import ParityRecord, check_parity, enforce, enforce_layer
from glm_quant.parity.measures import relative_error
from glm_quant.parity.reference import ReferenceModel, indexer_rotation, require_reference
from glm_quant.parity.stream import stream
from glm_quant.parity.whole import follow, reference_outcomes
from glm_quant.recipe import ParitySettings
from glm_quant.settings import Bound
from tests.hub_server import HubServer

TOKENS = 96  # one and a half times the trained checkpoint's index_topk


@pytest.fixture(scope="module")
def record(suite: SimpleNamespace, build: Path) -> ParityRecord:
    return check_parity(Checkpoint.open(suite.tiny), build, ParitySettings(tokens=TOKENS))


def test_record_tells_what_was_compared(record: ParityRecord, suite: SimpleNamespace) -> None:
    assert set(record.versions) == {"mlx", "mlx-lm", "torch", "transformers"}
    assert [row.kind for row in record.layers] == ["full", "full", "shared", "full", "shared"]
    assert record.max_layer_error < suite.bound
    assert record.logits is not None
    assert max(record.logits.below_topk, record.logits.above_topk) < suite.bound
    assert record.logits.cached < suite.bound
    assert record.mean_kl is not None
    assert 0 < record.mean_kl < 2
    assert ParityRecord.model_validate_json(record.model_dump_json()) == record


def test_error_growth_of_the_build_is_in_the_table(record: ParityRecord) -> None:
    """A 2-bit build drifts; its first layer is nearer to the reference than its last."""
    growth = [row.build_error for row in record.layers]
    assert all(error is not None and 0 < error < 1 for error in growth)
    assert growth[0] < growth[-1]  # type: ignore[operator]
    assert record.layers[3].build_keys is not None
    assert 0.3 < record.layers[3].build_keys < 1
    assert record.layers[0].build_experts is None  # a dense layer


def test_streaming_equals_the_whole_model(suite: SimpleNamespace, build: Path) -> None:
    """Layer by layer, and experts block by block, the same logits come out: theirs and ours."""
    tokens = suite.seeded_tokens(TOKENS, vocab_size=1000)
    checkpoint = Checkpoint.open(suite.tiny)
    found = stream(checkpoint, build, tokens, list(range(5)))
    assert found.reference_logits is not None
    assert found.build_logits is not None
    whole = ReferenceModel(suite.tiny).logits(tokens)
    assert relative_error(found.reference_logits, whole) < suite.bound
    assert np.array_equal(found.build_logits, logits_of(load_candidate(build), tokens))


def test_experts_in_blocks_change_nothing(
    suite: SimpleNamespace, build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of five of twelve experts: what lets GLM-5.2's layers into a few GB."""
    monkeypatch.setattr(reference, "_BLOCK_BYTES", 5 * 12 * 64 * 256)
    monkeypatch.setattr(candidate, "_BLOCK_BYTES", 5 * 12 * 64 * 256)
    tokens = suite.seeded_tokens(70, vocab_size=1000)
    found = stream(Checkpoint.open(suite.tiny), build, tokens, [0, 1, 2])
    assert found.reference_logits is None  # the pass ended before the last layer
    assert [row.layer for row in found.rows] == [0, 1, 2]
    assert max(row.mlp_error for row in found.rows) < suite.bound


def test_only_listed_layers_are_compared(suite: SimpleNamespace, build: Path) -> None:
    found = check_parity(
        Checkpoint.open(suite.tiny), build, ParitySettings(tokens=TOKENS, layers=(2,))
    )
    assert [row.layer for row in found.layers] == [2]
    assert found.logits is None
    assert found.mean_kl is None


def test_a_source_on_the_hub_gives_the_same_record(
    record: ParityRecord, suite: SimpleNamespace, build: Path, tmp_path: Path
) -> None:
    """Streamed and as a whole; nothing of the source stays on disk."""
    with HubServer() as hub:
        hub.add_folder("org/tiny", suite.tiny)
        source = HubSource("org/tiny", "main", tmp_path / "source", endpoint=hub.url)
        settings = ParitySettings(tokens=TOKENS)
        found = check_parity(Checkpoint(source), build, settings, tmp_path / "scratch")
    assert found.model_dump() == record.model_dump()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_source_on_the_hub_is_fetched_once_and_a_layer_at_a_time(
    suite: SimpleNamespace, build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides read each weight, the network sees it once, the disk until the next layer."""
    held: list[int] = []
    forget = SpooledSource.forget

    def watch(self: SpooledSource) -> None:
        held.append(sum(p.stat().st_size for p in tmp_path.rglob("*") if p.is_file()))
        forget(self)

    monkeypatch.setattr(SpooledSource, "forget", watch)
    with HubServer() as hub:
        hub.add_folder("org/tiny", suite.tiny)
        checkpoint = Checkpoint(HubSource("org/tiny", "main", endpoint=hub.url))
        check_parity(checkpoint, build, ParitySettings(tokens=TOKENS, layers=(1, 2)), tmp_path)
        asked = [(request.file, request.range) for request in hub.requests("^/cdn/")]
    assert len(asked) > 100  # a layer's tensors, one by one
    assert len(set(asked)) == len(asked)
    assert len(held) == 3
    total = sum(info.size_bytes for info in checkpoint.tensors.values())
    assert 0 < max(held) < total / 3


def test_a_prompt_that_selects_everything_is_refused(suite: SimpleNamespace, build: Path) -> None:
    with pytest.raises(RecipeError, match=r"parity\.tokens is 64 and index_topk is 64"):
        check_parity(Checkpoint.open(suite.tiny), build, ParitySettings(tokens=64))


def test_layers_that_do_not_exist_are_refused(suite: SimpleNamespace, build: Path) -> None:
    with pytest.raises(RecipeError, match="outside 0 to 4"):
        check_parity(Checkpoint.open(suite.tiny), build, ParitySettings(tokens=TOKENS, layers=(5,)))


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (
            [("layer_error", "max", 1e-12)],
            r"layer 0 \(full\): attention error is .*e-0\d, .* 1e-12",
        ),
        (
            [("logit_error", "max", 1e-12), ("layer_error", "max", 1)],
            r"\(below_topk\) is .* 1e-12",
        ),
        ([("mean_kl", "max", 1e-6)], r"mean_kl is .*; the recipe's max is 1e-06\. Raise the bits"),
        ([("top1_agreement", "min", 1.0)], r"top1_agreement is 0\.\d+; the recipe's min is 1\."),
    ],
)
def test_a_broken_bound_names_measure_and_both_numbers(
    record: ParityRecord, bounds: list[tuple[str, str, float]], message: str
) -> None:
    limits = [Bound.model_validate({"measure": name, end: limit}) for name, end, limit in bounds]
    settings = ParitySettings(tokens=TOKENS, bounds=tuple(limits))

    def judge() -> None:
        for row in record.layers:
            enforce_layer(row, TOKENS, settings, Path("build"))
        enforce(record.model_copy(update={"settings": settings}), Path("build"))

    with pytest.raises(ParityError, match=message):
        judge()


def test_a_wrong_runtime_stops_the_flow(
    suite: SimpleNamespace, build: Path, tmp_path: Path
) -> None:
    """The runtime under test is the one in the output: broken there, it is caught there."""
    broken = shutil.copytree(build, tmp_path / "broken")
    file = broken / "glm_moe_dsa.py"
    text = file.read_text()
    assert "self.rope = make_rope(args, args.indexer_traditional)" in text
    file.write_text(
        text.replace("make_rope(args, args.indexer_traditional)", "make_rope(args, False)")
    )
    with pytest.raises(ParityError, match=r"layer 0 \(full\): \d+ of 96 rows choose other keys"):
        check_parity(Checkpoint.open(suite.tiny), broken, ParitySettings(tokens=TOKENS))


def test_a_build_without_runtime_is_refused(
    suite: SimpleNamespace, build: Path, tmp_path: Path
) -> None:
    bare = shutil.copytree(build, tmp_path / "bare")
    (bare / "glm_moe_dsa.py").unlink()
    with pytest.raises(CheckpointError, match=r"model_file is 'glm_moe_dsa\.py', and without"):
        check_parity(Checkpoint.open(suite.tiny), bare, ParitySettings(tokens=TOKENS))


def test_half_split_reference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Releases of transformers before its #46842 must not serve as the truth."""
    import torch
    from transformers.models.glm_moe_dsa import modeling_glm_moe_dsa as code

    def half_split(q: Any, k: Any, cos: Any, sin: Any, unsqueeze_dim: int = 1) -> tuple[Any, Any]:
        def turn(x: Any) -> Any:
            first, second = x.chunk(2, -1)
            c, s = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
            return x * c + torch.cat([-second, first], -1) * s

        return turn(q), turn(k)

    assert indexer_rotation() == "interleaved"
    monkeypatch.setattr(code, "apply_rotary_pos_emb_interleave", half_split)
    assert indexer_rotation() == "half-split"
    require_reference.cache_clear()
    with pytest.raises(ParityError, match="rotates GLM's indexer half-split"):
        require_reference()
    require_reference.cache_clear()


def test_absent_reference_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: str) -> str:
        raise reference.PackageNotFoundError("torch")

    monkeypatch.setattr(reference, "version", missing)
    require_reference.cache_clear()
    with pytest.raises(ParityError, match="uv sync --group parity"):
        require_reference()
    require_reference.cache_clear()


def test_exact_ties_are_counted_and_settled(suite: SimpleNamespace, tmp_path: Path) -> None:
    """With one index head most scores are exactly zero: which zeros win is nobody's error."""

    def edit(parameters: dict[str, Any]) -> None:
        for name, value in parameters.items():
            if "weights_proj" in name:
                value.abs_()

    pair = suite.make_pair(tmp_path / "pair", index_n_heads=1, edit=edit)
    tokens = suite.seeded_tokens(60)
    unsettled = suite.errors(pair, tokens)["one call"]
    assert unsettled > 50 * suite.bound
    outcomes = reference_outcomes(Checkpoint.open(pair.source), tokens)
    model = load_unquantized(pair.source, pair.output)
    followers = follow(model, outcomes)
    logits = np.array(model(mx.array(tokens)[None])[0])
    assert sum(f.wrong for f in followers) == 0
    assert sum(f.tied for f in followers) > 10
    assert relative_error(logits, ReferenceModel(pair.source).logits(tokens)) < suite.bound
