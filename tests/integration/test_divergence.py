"""Streamed KL: equal to whole-model evaluation, resumed at a layer, and kept for the next build."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load

from glm_quant.checkpoint.reader import Checkpoint
from glm_quant.data import tiny_glm_path
from glm_quant.errors import CheckpointError, EvaluationError, IntegrityError, RecipeError
from glm_quant.evaluation import divergence as module
from glm_quant.evaluation.divergence import build_folder, check_bounds, divergence
from glm_quant.evaluation.divergence_beside import compare_divergence
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.token_set import TokenSet, TokenSlice, make_token_set
from glm_quant.hub.huggingface import HubSource
from glm_quant.model.geometry import Geometry
from glm_quant.parity.candidate import load_unquantized, logits_of
from glm_quant.parity.measures import kl_divergence, log_softmax, relative_error, top1_agreement
from glm_quant.recipe import DivergenceSettings, Recipe, load_recipe
from glm_quant.settings import Bound
from glm_quant.streaming import forward as streaming
from glm_quant.streaming.activations import load_arrays
from glm_quant.streaming.forward import stream_states
from glm_quant.streaming.memory_plan import plan_memory
from glm_quant.streaming.weights import BuildWeights, SourceWeights
from tests.hub_server import HubServer
from tests.plain import PLAIN

# As tests/parity: what two orders of summation in float32 make of the small checkpoint's logits.
BOUND = 2e-5
LENGTHS = (80, 24, 72)  # index_topk is 64
GIGABYTES = 4 << 30


@pytest.fixture(scope="module")
def source() -> Checkpoint:
    return Checkpoint.open(tiny_glm_path())


@pytest.fixture(scope="module")
def make_build(tmp_path_factory: pytest.TempPathFactory, prepare: Callable[..., Any]) -> Any:
    def make(recipe: Recipe | str) -> Path:
        made = prepare(
            tiny_glm_path(),
            tmp_path_factory.mktemp("build"),
            load_recipe(recipe) if isinstance(recipe, str) else recipe,
        )
        made.complete_all()
        made.assemble()
        return made.output

    return make


@pytest.fixture(scope="module")
def build(make_build: Callable[[str], Path]) -> Path:
    return make_build(PLAIN)


@pytest.fixture(scope="module")
def tokens(source: Checkpoint) -> TokenSet:
    """Three sequences of two slices, cut from the built-in texts."""
    made = make_token_set(source, DivergenceSettings(tokens=80, context=80))
    code, english = made.slices[1].sequences[0], made.slices[0].sequences[0]
    return TokenSet(
        (
            TokenSlice("code", "0" * 64, (code[: LENGTHS[0]], english[: LENGTHS[1]])),
            TokenSlice("english", "1" * 64, (english[: LENGTHS[2]],)),
        )
    )


@pytest.fixture(scope="module")
def whole(source: Checkpoint, build: Path, tokens: TokenSet) -> tuple[list[Any], list[Any]]:
    """Logits of source and build by whole models in memory, the build's through stock mlx-lm."""
    unquantized = load_unquantized(tiny_glm_path(), build)
    shipped = load(str(build), trust_remote_code=True)[0]
    shipped.set_dtype(mx.float32)
    return tuple(  # pyright: ignore[reportReturnType]
        [logits_of(model, sequence) for sequence in tokens.sequences]
        for model in (unquantized, shipped)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("divergence")


@pytest.fixture(scope="module")
def record(source: Checkpoint, build: Path, tokens: TokenSet, folder: Path) -> DivergenceRecord:
    return divergence(source, build, tokens, folder, memory_bytes=GIGABYTES)


def test_streamed_logits_equal_the_whole_models(
    source: Checkpoint,
    build: Path,
    tokens: TokenSet,
    whole: tuple[list[Any], list[Any]],
    tmp_path: Path,
) -> None:
    """Of both models, at every position, below and above index_topk."""
    geometry = Geometry.from_config(source.config)
    plan = plan_memory(geometry, LENGTHS, GIGABYTES, 1 << 26)
    for weights, logits in zip((SourceWeights(source), BuildWeights(build)), whole, strict=True):
        states = stream_states(weights, tokens.sequences, plan, tmp_path / type(weights).__name__)
        head = weights.head(0, geometry.vocab_size)
        for path, expected in zip(states, logits, strict=True):
            found = np.array(mx.array(load_arrays(path)["hidden"]) @ head.T)
            assert relative_error(found, expected) < BOUND


def test_streamed_kl_equals_the_whole_models(
    record: DivergenceRecord, whole: tuple[list[Any], list[Any]], tokens: TokenSet
) -> None:
    """Mean, median, 99 %, largest, agreement and both losses; all positions and each bucket."""
    kl = np.concatenate([kl_divergence(p, q) for p, q in zip(*whole, strict=True)])
    place = np.concatenate([np.arange(length) for length in LENGTHS])
    row = record.row()
    assert row.positions == sum(LENGTHS)
    assert row.mean_kl.value == pytest.approx(kl.mean(), abs=1e-5)
    assert row.median_kl == pytest.approx(np.median(kl), abs=1e-5)
    assert row.p99_kl == pytest.approx(np.quantile(kl, 0.99), abs=1e-4)
    assert row.max_kl == pytest.approx(kl.max(), abs=1e-4)
    above, below = record.row(bucket="above"), record.row(bucket="below")
    assert above.mean_kl.value == pytest.approx(kl[place >= 64].mean(), abs=1e-5)
    assert below.mean_kl.value == pytest.approx(kl[place < 64].mean(), abs=1e-5)
    assert above.positions == 16 + 8
    agreement = top1_agreement(*(np.concatenate(side) for side in whole))
    assert row.top1_agreement.value == pytest.approx(agreement)
    for side, found in zip(whole, (row.reference_nll, row.build_nll), strict=True):
        losses = [
            -log_softmax(logits[:-1])[np.arange(len(ids) - 1), ids[1:]]
            for logits, ids in zip(side, tokens.sequences, strict=True)
        ]
        assert found.value == pytest.approx(np.concatenate(losses).mean(), abs=1e-5)
    english = kl[LENGTHS[0] + LENGTHS[1] :]
    assert record.row("english").mean_kl.value == pytest.approx(english.mean(), abs=1e-5)
    assert record.row("english").mean_kl.standard_error is None  # one sequence
    assert row.scored == sum(LENGTHS) - 3


def test_differences_are_paired(record: DivergenceRecord, folder: Path) -> None:
    """The error of build less source is that of the differences, far below those of the losses."""
    row = record.row()
    assert row.nll_difference.value == pytest.approx(row.build_nll.value - row.reference_nll.value)
    assert row.nll_difference.standard_error is not None
    assert row.build_nll.standard_error is not None
    assert row.nll_difference.standard_error < row.build_nll.standard_error
    (path,) = folder.glob("build-*/positions.safetensors")
    kept = load_arrays(path)
    assert kept["kl"].mean() == pytest.approx(row.mean_kl.value)
    assert kept["lengths"].tolist() == list(LENGTHS)


def test_waves_within_a_memory_limit_change_nothing(
    source: Checkpoint, build: Path, tokens: TokenSet, record: DivergenceRecord, tmp_path: Path
) -> None:
    """A limit with room for one sequence at a time gives the same numbers, and is kept to."""
    geometry = Geometry.from_config(source.config)
    roomy = plan_memory(geometry, LENGTHS, GIGABYTES, 1 << 26)
    limit = roomy.fixed_bytes + 85 * roomy.token_bytes
    found = divergence(source, build, tokens, tmp_path, memory_bytes=limit)
    assert (record.build_pass.waves, found.build_pass.waves) == (1, 3)
    assert found.build_pass.planned_bytes <= limit
    assert found.build_pass.mlx_peak_bytes < found.build_pass.planned_bytes
    assert found.row().mean_kl.value == pytest.approx(record.row().mean_kl.value, abs=1e-6)
    assert found.row().max_kl == pytest.approx(record.row().max_kl, abs=1e-5)


def test_too_small_a_limit_is_refused_before_anything_is_read(
    source: Checkpoint, build: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    with pytest.raises(
        EvaluationError, match=r"1\.\d\d GB are needed for a sequence of 80 tokens, the limit is 0"
    ):
        divergence(source, build, tokens, tmp_path, memory_bytes=1 << 20)
    assert not list(tmp_path.iterdir())


def test_a_killed_pass_goes_on_at_its_layer(
    source: Checkpoint,
    build: Path,
    tokens: TokenSet,
    record: DivergenceRecord,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing that was done is done again, half-written files are no states, the end is equal."""
    layer = SourceWeights.layer
    read: list[int] = []

    def failing(self: SourceWeights, index: int) -> Any:
        if index == 3:
            raise KeyboardInterrupt
        read.append(index)
        return layer(self, index)

    monkeypatch.setattr(SourceWeights, "layer", failing)
    with pytest.raises(KeyboardInterrupt):
        divergence(source, build, tokens, tmp_path, memory_bytes=GIGABYTES)
    (states,) = tmp_path.glob("reference-*/states-*")
    assert [path.name for path in states.iterdir()] == ["layer-003-wave-000.safetensors"]
    (states / ".layer-004-wave-000.safetensors.77.part").write_bytes(b"half")
    monkeypatch.setattr(
        SourceWeights, "layer", lambda self, index: (read.append(index), layer(self, index))[1]
    )
    found = divergence(source, build, tokens, tmp_path, memory_bytes=GIGABYTES)
    assert read == [0, 1, 2, 3, 4]
    assert found.rows == record.rows
    assert not list(tmp_path.rglob("states-*"))


def test_the_source_is_streamed_once_for_all_builds(
    source: Checkpoint,
    build: Path,
    tokens: TokenSet,
    record: DivergenceRecord,
    folder: Path,
    make_build: Callable[[Any], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A second build, and the first one again, use what stands; other tokens do not."""
    asked: list[type] = []
    real = streaming.stream_states

    def counted(weights: Any, *rest: Any) -> Any:
        asked.append(type(weights))
        return real(weights, *rest)

    monkeypatch.setattr(module, "stream_states", counted)
    assert divergence(source, build, tokens, folder, memory_bytes=GIGABYTES) == record
    assert asked == []
    other = make_build("uniform-4bit")
    found = divergence(source, other, tokens, folder, memory_bytes=GIGABYTES)
    assert asked == [BuildWeights]
    assert found.reference == record.reference
    assert found.row().mean_kl.value < record.row().mean_kl.value
    fewer = TokenSet(tokens.slices[:1])
    divergence(source, build, fewer, folder, memory_bytes=GIGABYTES)
    assert asked == [BuildWeights, SourceWeights, BuildWeights]


def test_a_reference_with_a_flipped_bit_is_refused(
    source: Checkpoint, build: Path, tokens: TokenSet, tmp_path: Path
) -> None:
    tokens = TokenSet(tokens.slices[1:])
    divergence(source, build, tokens, tmp_path, memory_bytes=GIGABYTES)
    (states,) = tmp_path.glob("reference-*/sequence-0000.safetensors")
    data = bytearray(states.read_bytes())
    data[-5] ^= 1
    states.write_bytes(data)
    for folder in tmp_path.glob("build-*"):
        (folder / "record.json").unlink()
    with pytest.raises(IntegrityError, match=r"sequence-0000\.safetensors: the record says sha256"):
        divergence(source, build, tokens, tmp_path, memory_bytes=GIGABYTES)


def test_a_source_on_the_hub_is_read_by_range(
    build: Path, tokens: TokenSet, record: DivergenceRecord, tmp_path: Path
) -> None:
    """The same numbers; no shard of it is ever fetched as a whole."""
    with HubServer() as hub:
        hub.add_folder("org/tiny", tiny_glm_path())
        remote = Checkpoint(HubSource("org/tiny", "main", endpoint=hub.url))
        found = divergence(remote, build, tokens, tmp_path, memory_bytes=GIGABYTES)
        settings = DivergenceSettings(tokens=64, context=64)
        assert (
            make_token_set(remote, settings).sha256
            == make_token_set(Checkpoint.open(tiny_glm_path()), settings).sha256
        )
    assert found.rows == record.rows
    assert found.source.startswith("hf://org/tiny@")


ONE_SLICE = (Bound(measure="mean_kl/code", max=1e-4),)


def bounded(measure: str, **limits: float) -> dict[str, Any]:
    return {"bounds": (Bound.model_validate({"measure": measure, **limits}),)}


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        (bounded("mean_kl", max=1e-4), r"mean_kl is 0\.\d+; the recipe's max is 0\.0001\. Give"),
        (bounded("p99_kl", max=1e-4), r"p99_kl is \d\.\d+; the recipe's max is 0\.0001"),
        (bounded("nll_difference", max=-1), r"nll_difference is .*; the recipe's max is -1"),
        (bounded("top1_agreement", min=1.0), r"top1_agreement is 0\.\d+; the recipe's min is 1\."),
        (
            {"texts": {"code": "", "english": ""}, "bounds": ONE_SLICE},
            r"divergence: mean_kl/code is 0\.\d+; the recipe's max is 0\.0001",
        ),
    ],
)
def test_a_broken_bound_names_measure_and_both_numbers(
    record: DivergenceRecord, bounds: dict[str, float], message: str
) -> None:
    check_bounds(record, DivergenceSettings())
    with pytest.raises(EvaluationError, match=message):
        check_bounds(record, DivergenceSettings(**bounds))  # pyright: ignore


def test_builds_are_compared_sequence_by_sequence(
    record: DivergenceRecord,
    folder: Path,
    source: Checkpoint,
    tokens: TokenSet,
    make_build: Any,
    tmp_path: Path,
) -> None:
    """A build with experts in 8 bits is nearer to the source, by a paired error; a bound tells."""
    demo = load_recipe(PLAIN)
    finer = [rule.model_copy(update={"bits": 8}) if rule.bits else rule for rule in demo.rules]
    better = make_build(demo.model_copy(update={"rules": tuple(finer), "quantizer": "minmax"}))
    other = divergence(source, better, tokens, tmp_path, references=folder)
    sides = (record, build_folder(folder, record)), (other, build_folder(tmp_path, other))
    found = {each.measure: each for each in compare_divergence("8-bit", *sides)}
    arrays = [load_arrays(at / each.outputs[0].path)["kl"] for each, at in sides]
    gaps = [part.mean() for part in np.split(arrays[0] - arrays[1], np.cumsum(LENGTHS)[:-1])]
    assert found["mean_kl"].difference == pytest.approx((arrays[0] - arrays[1]).mean())
    assert (found["mean_kl"].difference > 0, found["mean_kl"].pairs) == (True, 3)
    # Of a ratio of sums over sequences (Cochran): deviations weigh as the sequences are long.
    lengths = np.array(LENGTHS)
    mean = (gaps * lengths).sum() / lengths.sum()
    error = np.sqrt(1.5 * (((gaps - mean) * lengths) ** 2).sum()) / lengths.sum()
    assert found["mean_kl"].standard_error == pytest.approx(error)
    assert found["mean_kl/english"].standard_error is None  # one sequence
    assert found["p99_kl"].pairs == 0
    beside = record.model_copy(update={"comparisons": tuple(found.values())})
    bound = Bound(measure="mean_kl", max=1.5, baseline="8-bit", ratio=True)
    with pytest.raises(EvaluationError, match=r"mean_kl is .*'8-bit' .* of it; .* max is 1\.5"):
        check_bounds(beside, DivergenceSettings(bounds=(bound,)))
    unlike = (other.model_copy(update={"reference": "another"}), sides[1][1])
    assert compare_divergence("8-bit", sides[0], unlike) == []


def test_slices_are_cut_as_the_recipe_says(source: Checkpoint, tmp_path: Path) -> None:
    """Seeded windows of its own texts; a chat goes through the chat template."""
    text, chat = tmp_path / "words.txt", tmp_path / "chat.json"
    text.write_text("import os\n" * 400)
    chat.write_text('[[{"role": "user", "content": "What is two and two?"}]]')
    settings = DivergenceSettings(
        texts={"words": str(text), "chat": str(chat)}, tokens=128, context=32
    )
    made = make_token_set(source, settings)
    assert [part.name for part in made.slices] == ["words", "chat"]
    assert len(made.slices[0].sequences) == 4
    assert {len(ids) for ids in made.slices[0].sequences} == {32}
    assert "<|user|>" in _decode(source, made.slices[1].sequences[0])
    again = make_token_set(source, settings)
    assert again.sha256 == made.sha256
    other = make_token_set(source, settings.model_copy(update={"seed": 1}))
    assert other.sha256 != made.sha256
    with pytest.raises(RecipeError, match=r"none\.txt: the text of divergence\.texts\.a cannot"):
        make_token_set(source, DivergenceSettings(texts={"a": str(tmp_path / "none.txt")}))


def test_built_in_slices_are_four(source: Checkpoint) -> None:
    made = make_token_set(source, DivergenceSettings(tokens=256, context=128))
    assert [part.name for part in made.slices] == ["english", "code", "chinese", "chat"]
    assert all(len(part.sequences) == 2 for part in made.slices)


def test_a_build_without_a_tensor_is_named(build: Path, tmp_path: Path) -> None:
    weights = BuildWeights(build)
    with pytest.raises(CheckpointError, match=r"there is no tensor model\.layers\.9\.x\.weight"):
        weights.rows("model.layers.9.x", 0, 1)


def _decode(source: Checkpoint, ids: Any) -> str:
    from glm_quant.evaluation.token_set import load_tokenizer

    return load_tokenizer(source).decode(ids.tolist())
