"""Figures by the peers' protocols equal those of the peers' own commands, on the same model."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load
from mlx_lm import perplexity as perplexity_command

from glm_quant.data import held_out_text, tiny_glm_path
from glm_quant.errors import EvaluationError, RecipeError
from glm_quant.evaluation import harness as our_harness
from glm_quant.evaluation.evaluate import evaluate, require_measurable, require_packages
from glm_quant.evaluation.harness import write_task
from glm_quant.evaluation.mlx_lm_protocols import measure_peer_perplexity
from glm_quant.evaluation.perplexity import digest_text
from glm_quant.evaluation.records import EvaluationRecord
from glm_quant.recipe import load_recipe
from glm_quant.settings import (
    EvaluationSettings,
    HarnessSettings,
    PeerPerplexitySettings,
    TextDatasetSettings,
)
from tests.conftest import with_quantizer
from tests.hub_server import HubServer
from tests.hub_server.content import Content
from tests.plain import PLAIN

pytest.importorskip("lm_eval")

pytestmark = pytest.mark.slow

LENGTH, SAMPLES, ITEMS = 96, 6, 4


def save_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with small files in the schemas of the Hub's datasets."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "chats").mkdir()
    text = held_out_text()
    parts = [text[i : i + 200] for i in range(0, 12_000, 200)]
    turns = zip(parts[::2], parts[1::2], strict=True)
    chats = [
        {"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in turns
    ]
    save_rows(folder / "chats" / "train.jsonl", chats)
    endings = [["return self", "zq zq", "import os", "x [header] y"], ["x = 1", "pass", "a", "b"]]
    hellaswag = [
        {
            "activity_label": "Coding",
            "ctx_a": parts[i][:60],
            "ctx_b": "then " + parts[i][60:90],
            "endings": endings[i % 2],
            "label": str(i % 4),
        }
        for i in range(ITEMS + 2)
    ]
    piqa = [
        {"goal": parts[i][:50], "sol1": parts[i][50:90], "sol2": "zqzq", "label": i % 2}
        for i in range(ITEMS)
    ]
    winogrande = [
        {"sentence": f"def {n}(_): return {n}", "option1": n, "option2": "zq", "answer": "1"}
        for n in ("value", "name", "path", "size")
    ]
    save_rows(folder / "hellaswag.jsonl", hellaswag)
    save_rows(folder / "piqa.jsonl", piqa)
    save_rows(folder / "winogrande.jsonl", winogrande)
    return folder


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory, prepare: Callable) -> Path:
    """Give a finished build of the shipped checkpoint. Not to be written to."""
    recipe = with_quantizer(load_recipe(PLAIN), "minmax")
    made = prepare(tiny_glm_path(), tmp_path_factory.mktemp("build"), recipe)
    made.complete_all()
    made.assemble()
    return made.output


@pytest.fixture(scope="module")
def settings(data: Path) -> EvaluationSettings:
    tasks = ("hellaswag", "piqa", "winogrande")
    return EvaluationSettings(
        perplexity_tokens=64,
        context=64,
        stride=32,
        prompt_tokens=(),
        peer_perplexity=PeerPerplexitySettings(
            file=str(data / "chats" / "train.jsonl"),
            sequence_length=LENGTH,
            num_samples=SAMPLES,
            batch_size=4,
        ),
        harness=HarnessSettings(
            tasks=tasks, files={name: str(data / f"{name}.jsonl") for name in tasks}, limit=ITEMS
        ),
    )


@pytest.fixture(scope="module")
def record(build: Path, settings: EvaluationSettings) -> EvaluationRecord:
    """Give what the evaluation's own process measured."""
    told: list[tuple[int, int]] = []
    found = evaluate(build, settings, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    return found


def load_as_evaluated(path: str, **options: Any) -> Any:
    """Load as mlx-lm does, and compute in float32 on the CPU as evaluations do."""
    model, tokenizer = load(path, **options)[:2]
    if mx.default_device() != mx.gpu:
        model.set_dtype(mx.float32)
    return model, tokenizer


def test_perplexity_is_that_of_the_command(
    record: EvaluationRecord,
    build: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`mlx_lm.perplexity` on a folder of the same rows prints the same number and error."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(perplexity_command, "load", load_as_evaluated)
    model = ["--model", str(build), "--trust-remote-code", "--data-path", str(data / "chats")]
    size = ["--sequence-length", str(LENGTH), "--num-samples", str(SAMPLES), "--batch-size", "4"]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.perplexity", *model, *size])
    perplexity_command.main()
    found = record.measurements.peer_perplexity
    assert found is not None
    printed = capsys.readouterr().out
    assert f"Perplexity: {found.value:.3f} ± {found.standard_error:.3f}\n" in printed
    assert f"Total samples: {found.samples}\n" in printed
    assert len(found.sequence_nll) == SAMPLES
    assert sum(found.sequence_nll) / SAMPLES == pytest.approx(mx.log(found.value).item(), rel=1e-5)


def test_tasks_are_those_of_the_command(
    record: EvaluationRecord,
    build: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`mlx_lm.evaluate` with the same items writes the same scores and errors, every metric."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager
    from mlx_lm import evaluate as evaluate_command

    found = record.measurements.harness
    assert found is not None
    folder = Path(evaluator.__file__).parent / "tasks"
    # All tasks would take 15 seconds to read.
    only = [str(folder / task.task) for task in found.tasks]
    manager = TaskManager(include_path=only, include_defaults=False)
    monkeypatch.setattr(evaluator, "TaskManager", lambda **_options: manager)
    for task in found.tasks:
        write_task(task.task, data / f"{task.task}.jsonl", tmp_path, manager)
    monkeypatch.setattr(evaluate_command, "load", load_as_evaluated)
    monkeypatch.chdir(tmp_path)  # the command names its file after the tasks
    names = [f"{task.task}.yaml" for task in found.tasks]
    options = ["--num-shots", "0", "--limit", str(ITEMS), "--trust-remote-code"]
    command = ["mlx_lm.evaluate", "--model", str(build), "--tasks", *names, *options]
    monkeypatch.setattr(sys, "argv", command)
    evaluate_command.main()
    (written,) = tmp_path.glob("eval_*")
    results = json.loads(written.read_text())
    for task in found.tasks:
        assert task.scores
        for score in task.scores:
            assert score.value == results[task.task][f"{score.metric},none"]
            assert score.standard_error == results[task.task][f"{score.metric}_stderr,none"]
        assert len(task.items) == ITEMS
        assert sum(task.items) / ITEMS == task.score.value
        low, high = task.score.interval() or (1, 0)
        assert low <= task.score.value <= high
    metrics = {task.task: task.metric for task in found.tasks}
    assert metrics == {"hellaswag": "acc_norm", "piqa": "acc", "winogrande": "acc"}
    assert found.chat_template  # as the command: the build has one


# Repositories and files of the data sets that the recipes name, as the Hub has them.
ON_THE_HUB = {
    "chats/train": ("allenai/tulu-3-sft-mixture", "data/train-00000-of-00001.parquet"),
    "hellaswag": ("Rowan/hellaswag", "data/validation-00000-of-00001.parquet"),
    "piqa": ("baber/piqa", "data/validation-00000-of-00001.parquet"),
    "winogrande": ("allenai/winogrande", "winogrande_xl/validation-00000-of-00001.parquet"),
}
CONFIGS = """\
---
configs:
- config_name: winogrande_xl
  data_files:
  - {split: validation, path: winogrande_xl/validation-*}
  - {split: train, path: winogrande_xl/validation-*}
---
"""


WIKITEXT = "Salesforce/wikitext"
WIKITEXT_CONFIGS = """\
---
configs:
- config_name: wikitext-2-raw-v1
  data_files: [{split: test, path: wikitext-2-raw-v1/test-*}]
---
"""


def test_data_sets_come_from_the_hub_by_default(
    record: EvaluationRecord,
    build: Path,
    data: Path,
    settings: EvaluationSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The recipes' own data sets by the real clients, at a Hub: what files of the rows give."""
    import pyarrow
    from pyarrow import parquet

    lines = held_out_text().splitlines()[:99]
    with HubServer() as hub:
        for name, (repo, path) in ON_THE_HUB.items():
            rows = [json.loads(line) for line in (data / f"{name}.jsonl").read_text().splitlines()]
            file = tmp_path / f"{Path(name).name}.parquet"
            parquet.write_table(pyarrow.Table.from_pylist(rows), file)
            files = {path: Content.of(file), "data/train-00000-of-00001.parquet": Content.of(file)}
            if name == "winogrande":
                files = {path: Content.of(file), "README.md": Content.of_bytes(CONFIGS.encode())}
            hub.add_commit(repo, files)
        file = tmp_path / "wikitext.parquet"
        parquet.write_table(pyarrow.table({"text": lines}), file)
        files = {"wikitext-2-raw-v1/test-00000-of-00001.parquet": Content.of(file)}
        hub.add_commit(WIKITEXT, files | {"README.md": Content.of_bytes(WIKITEXT_CONFIGS.encode())})
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
        assert settings.peer_perplexity is not None
        assert settings.harness is not None
        found = evaluate(
            build,
            settings.model_copy(
                update={
                    "perplexity_datasets": {"wikitext": TextDatasetSettings()},
                    "peer_perplexity": settings.peer_perplexity.model_copy(update={"file": None}),
                    "harness": settings.harness.model_copy(update={"files": {}}),
                }
            ),
        )
        asked = hub.requests(r"^/datasets/.*\.parquet$")
        fetched = {request.path.split("/resolve/")[0] for request in asked}
    repos = {repo for repo, _ in ON_THE_HUB.values()} | {WIKITEXT}
    assert fetched == {f"/datasets/{repo}" for repo in repos}
    code, wikitext = found.measurements.perplexity
    assert code == record.measurements.perplexity[0]
    assert (wikitext.text, wikitext.text_sha256) == ("wikitext", digest_text("\n\n".join(lines)))
    peer, own = found.measurements.peer_perplexity, record.measurements.peer_perplexity
    assert peer is not None
    assert own is not None
    assert (peer.dataset, peer.dataset_sha256) == ("allenai/tulu-3-sft-mixture", None)
    assert (peer.value, peer.sequence_nll) == (own.value, own.sequence_nll)
    tasks, locally = found.measurements.harness, record.measurements.harness
    assert tasks is not None
    assert locally is not None
    for task, local in zip(tasks.tasks, locally.tasks, strict=True):
        assert (task.dataset, task.dataset_sha256) == (ON_THE_HUB[task.task][0], None)
        assert (task.scores, task.items) == (local.scores, local.items)


def test_too_short_a_dataset_is_named(build: Path, data: Path) -> None:
    """Both numbers, and what to lower."""
    model, tokenizer = load(str(build), trust_remote_code=True)[:2]
    settings = PeerPerplexitySettings(
        file=str(data / "chats" / "train.jsonl"), sequence_length=2048, num_samples=50
    )
    with pytest.raises(
        EvaluationError, match=r"train\.jsonl: .* shorter than the 102,400 tokens .* num_samples"
    ):
        measure_peer_perplexity(model, tokenizer, settings)


def test_missing_harness_and_data_are_found_before_anything_starts(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the way out: the extra to install, the file that is not there."""
    files = {"piqa": str(data / "none.jsonl")}
    absent = EvaluationSettings(harness=HarnessSettings(tasks=("piqa",), files=files))
    with pytest.raises(RecipeError, match=r"none\.jsonl: the recipe's data file for piqa is not"):
        require_measurable(absent)
    monkeypatch.setattr(our_harness, "find_spec", lambda _name: None)
    for settings, name in (
        (EvaluationSettings(harness=HarnessSettings()), "lm_eval"),
        (EvaluationSettings(peer_perplexity=PeerPerplexitySettings()), "datasets"),
    ):
        with pytest.raises(EvaluationError, match=rf"needs the package {name}.*--group harness"):
            require_packages(settings)
