"""A real build, evaluated in its own process, and the card that follows from it."""

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm import load

from glm_quant.data import held_out_text, tiny_glm_path
from glm_quant.errors import EvaluationError, RecipeError
from glm_quant.evaluation import evaluate as module
from glm_quant.evaluation.baselines import open_baseline
from glm_quant.evaluation.evaluate import evaluate, evaluation_inputs
from glm_quant.evaluation.perplexity import windows
from glm_quant.evaluation.records import EvaluationRecord
from glm_quant.fingerprint import fingerprint
from glm_quant.recipe import load_recipe
from glm_quant.settings import Bound, CoherenceSettings, EvaluationSettings
from tests.plain import PLAIN

SETTINGS = EvaluationSettings(
    perplexity_tokens=320,
    context=128,  # twice index_topk
    stride=96,
    prompt_tokens=(96,),
    generation_tokens=8,
    needle_lengths=(64, 160),
    needle_depths=(0.5,),
    needle_repeats=1,
)


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, prepare: Callable) -> Path:
    """Give a finished build of the shipped checkpoint. Not to be written to."""
    made = prepare(tiny_glm_path(), tmp_path_factory.mktemp("evaluated"), load_recipe(PLAIN))
    made.complete_all()
    made.assemble()
    return made.output


@pytest.fixture(scope="module")
def evaluated(build: Path) -> tuple[EvaluationRecord, list[tuple[int, int]]]:
    """Give the record of a small evaluation, and the progress that was told."""
    told: list[tuple[int, int]] = []
    record = evaluate(build, SETTINGS, progress=lambda done, total: told.append((done, total)))
    return record, told


def test_perplexity_equals_the_models_own_logits(
    build: Path, evaluated: tuple[EvaluationRecord, list[tuple[int, int]]]
) -> None:
    """The same windows through mlx-lm by hand, with plain cross-entropy, give the same number."""
    found = evaluated[0].measurements.perplexity[0]
    model, tokenizer = load(str(build), trust_remote_code=True)[:2]
    model.set_dtype(mx.float32)
    tokens = tokenizer.encode(held_out_text(), add_special_tokens=False)[:320]
    total = 0.0
    for window in windows(320, 128, 96):
        logits = model(mx.array(tokens[window.begin : window.end])[None])[0]
        likely = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        for position in range(window.first, window.end):
            total -= likely[position - window.begin - 1, tokens[position]].item()
    assert found.scored_tokens == 319
    assert found.mean_nll == pytest.approx(total / 319, rel=1e-5)  # float32 logits
    assert found.value == pytest.approx(math.exp(found.mean_nll))


def test_record_tells_how_and_where(
    build: Path, evaluated: tuple[EvaluationRecord, list[tuple[int, int]]]
) -> None:
    """Every number has its machine, its versions and its method, and none is left at zero."""
    record = evaluated[0]
    found = record.measurements
    assert record.fingerprint == fingerprint(evaluation_inputs(build, SETTINGS))
    assert {"glm-quant", "mlx", "mlx-lm"} <= set(found.versions)
    assert found.machine.cores == os.cpu_count()
    assert found.machine.memory_bytes > 1 << 30
    assert found.load.seconds > 0
    weights = sum(file.stat().st_size for file in build.glob("*.safetensors"))
    assert found.load.mlx_bytes == pytest.approx(weights, rel=0.05)
    speed = found.speed[0]
    assert (speed.prompt_tokens, speed.generated_tokens) == (96, 8)
    assert speed.prefill_rate > 0
    assert speed.decode_rate > 0
    assert weights < speed.mlx_peak_bytes <= found.mlx_peak_bytes < found.peak_rss_bytes


def test_needle_asks_at_every_length_and_depth(
    evaluated: tuple[EvaluationRecord, list[tuple[int, int]]],
) -> None:
    """Prompts are as long as asked for, within a line, and a hit is the code itself."""
    needle = evaluated[0].measurements.needle
    assert needle is not None
    assert [trial.length for trial in needle.trials] == [64, 160]
    for trial in needle.trials:
        assert trial.length * 0.7 < trial.prompt_tokens <= trial.length
        assert len(trial.expected) == 4
        assert not trial.retrieved or trial.expected in trial.reply


def test_progress_ends_at_its_total(
    evaluated: tuple[EvaluationRecord, list[tuple[int, int]]],
) -> None:
    """Tokens done grow to tokens to do, through the process's border."""
    told = evaluated[1]
    assert told == sorted(told)
    assert len({total for _, total in told}) == 1
    assert told[-1][0] == told[-1][1]


def test_broken_bound_stops_with_both_numbers(
    evaluated: tuple[EvaluationRecord, list[tuple[int, int]]], build: Path
) -> None:
    """A perplexity of 1.5 is out of reach of so small a model."""
    quick = EvaluationSettings(
        perplexity_tokens=64,
        context=64,
        stride=32,
        prompt_tokens=(),
        bounds=(Bound(measure="perplexity", max=1.5),),
    )
    with pytest.raises(EvaluationError, match=r"perplexity is \d+\.\d+; the recipe's max is 1\.5"):
        evaluate(build, quick)


def _with_runtime(build: Path, folder: Path, code: str) -> Path:
    broken = folder / "broken"
    shutil.copytree(build, broken)
    runtime = broken / "glm_moe_dsa.py"
    runtime.write_text(runtime.read_text() + code)
    return broken


def test_crash_of_the_model_is_an_error_with_its_last_words(build: Path, tmp_path: Path) -> None:
    """A model that kills its process does not take this one, and what it said is kept."""
    code = "\n\nimport os, sys\nsys.stderr.write('out of wired memory\\n')\nos.abort()\n"
    broken = _with_runtime(build, tmp_path, code)
    with pytest.raises(EvaluationError, match=r"(?s)killed by signal 6.*out of wired memory"):
        evaluate(broken, SETTINGS)


def test_exception_of_the_model_is_an_error_with_its_last_line(build: Path, tmp_path: Path) -> None:
    """A runtime that raises is told by the line of its traceback that says why."""
    broken = _with_runtime(build, tmp_path, "\n\nraise RuntimeError('no such kernel')\n")
    with pytest.raises(EvaluationError, match=r"(?s)ended with status 1.*no such kernel"):
        evaluate(broken, SETTINGS)


def test_prints_of_the_model_do_not_disturb(build: Path, tmp_path: Path) -> None:
    """Whatever a model's code writes to stdout is not taken for progress."""
    noisy = _with_runtime(
        build, tmp_path, "\n\nprint('[1]')\nprint('{\"done\": 1}')\nprint('hi')\n"
    )
    told: list[tuple[int, int]] = []
    quick = EvaluationSettings(perplexity_tokens=64, context=64, stride=32, prompt_tokens=())
    evaluate(noisy, quick, progress=lambda done, total: told.append((done, total)))
    assert told == [(63, 63)]


@pytest.fixture(scope="module")
def half_split(build: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give the build with another rotation in its indexer: a baseline that is another model."""
    other = shutil.copytree(build, tmp_path_factory.mktemp("half-split") / "build")
    config = json.loads((other / "config.json").read_text())
    config["indexer_rope_interleave"] = False
    (other / "config.json").write_text(json.dumps(config))
    (other / "manifest.json").write_bytes((build / "manifest.json").read_bytes() + b"\n")
    return other


def test_a_baseline_is_measured_alike_and_compared_in_pairs(
    build: Path, half_split: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Named texts, long outputs, a checkpoint as baseline; another bound measures nothing again."""
    text = tmp_path / "more.txt"
    text.write_text(held_out_text()[:4000])
    settings = EvaluationSettings(
        perplexity_tokens=400,
        context=160,  # above index_topk, so that the indexer decides
        stride=80,
        perplexity_texts={"code": str(text)},
        prompt_tokens=(),
        coherence=CoherenceSettings(prompts=("Write.",), tokens=16),
        bounds=(Bound(measure="perplexity/code", max=0, baseline="half-split"),),
    )
    given = {"folder": tmp_path / "kept", "baselines": {"half-split": str(half_split)}}
    record = evaluate(build, settings, **given)
    names = [each.text for each in record.measurements.perplexity]
    assert names[1:] == ["code"]
    found = {each.measure: each for each in record.comparisons}
    other = record.baselines[0].measurements
    for name, ours, theirs in zip(
        ("perplexity", "perplexity/code"),
        record.measurements.perplexity,
        other.perplexity,
        strict=True,
    ):
        each = found[name]
        assert (each.value, each.baseline_value) == (ours.value, theirs.value)
        assert each.pairs == ours.windows
        assert each.difference < 0  # the right rotation is better
        assert each.standard_error is not None
        assert ours.standard_error is not None
        assert each.standard_error < ours.standard_error  # the texts' own difficulty is shared
    coherence = record.measurements.coherence
    assert coherence is not None
    assert 0 < coherence.outputs[0].tokens <= 16
    assert other.coherence is not None

    monkeypatch.setattr(module, "run_in_child", None)  # whoever calls it fails
    tight = Bound(measure="perplexity", max=0.5, baseline="half-split", ratio=True)
    with pytest.raises(
        EvaluationError, match=r"perplexity is .*'half-split' .* of it; the recipe's max is 0\.5"
    ):
        evaluate(build, settings.model_copy(update={"bounds": (tight,)}), **given)


def test_a_finished_workspace_is_a_baseline(
    evaluated: tuple[EvaluationRecord, list[tuple[int, int]]], tmp_path: Path
) -> None:
    """Its record is read, from the workspace or by itself; a damaged one is told."""
    path = tmp_path / "work" / "records" / "evaluate.json"
    path.parent.mkdir(parents=True)
    evaluated[0].save(path)
    for place in (tmp_path / "work", path):
        found = open_baseline("b", str(place))
        assert (found.evaluation, found.place) == (evaluated[0], tmp_path / "work")
    path.write_bytes(path.read_bytes().replace(b"cpu", b"gpu"))
    with pytest.raises(RecipeError, match=r"evaluate\.json: this record of baseline 'b'"):
        open_baseline("b", str(tmp_path / "work"))
    with pytest.raises(RecipeError, match=r"nowhere: baseline 'b' is no workspace"):
        open_baseline("b", str(tmp_path / "nowhere"))


def test_too_short_a_text_is_named(build: Path, tmp_path: Path) -> None:
    """A text must fill one window."""
    text = tmp_path / "short.txt"
    text.write_text("import os\n")
    settings = EvaluationSettings(perplexity_text=str(text))
    with pytest.raises(
        EvaluationError, match=r"short\.txt: the text has \d+ tokens, the context is 512"
    ):
        evaluate(build, settings)


def test_missing_text_is_a_recipe_error(build: Path, tmp_path: Path) -> None:
    """It is found before a process is started."""
    settings = EvaluationSettings(perplexity_text=str(tmp_path / "none.txt"))
    with pytest.raises(
        RecipeError, match=r"none\.txt: the recipe's perplexity_text cannot be read"
    ):
        evaluate(build, settings)


def test_fingerprint_follows_build_settings_and_text(build: Path, tmp_path: Path) -> None:
    """Each of the three makes a measurement another one."""
    text = tmp_path / "other.txt"
    text.write_text("another text")
    other = shutil.copytree(build, tmp_path / "other")
    (other / "manifest.json").write_bytes((build / "manifest.json").read_bytes() + b"\n")
    settings = (
        SETTINGS,
        SETTINGS.model_copy(update={"stride": 64}),
        SETTINGS.model_copy(update={"perplexity_text": str(text)}),
    )
    found = {fingerprint(evaluation_inputs(build, each)) for each in settings}
    found.add(fingerprint(evaluation_inputs(other, SETTINGS)))
    assert len(found) == 4
