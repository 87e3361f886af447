"""Tasks of lm-evaluation-harness by `mlx_lm.evaluate`: its own model class, called as it calls it.

So the scores are those of the command. lm-evaluation-harness is an optional dependency
(`glm-quant[harness]`) and imported where it is used. The command
sends questions through the chat template wherever the build has one.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

import mlx.core as mx
import yaml

from glm_quant.artifact import sha256_file
from glm_quant.errors import EvaluationError
from glm_quant.evaluation.data_files import data_file
from glm_quant.evaluation.peer_records import Harness, HarnessScore, HarnessTask
from glm_quant.settings import HarnessSettings

_DEFAULT_METRIC = "acc"


def require_package(name: str, purpose: str) -> None:
    """Check that a package of the extra `harness` is there, without importing it.

    Args:
        name: as it is imported.
        purpose: the recipe's key that asks for it.

    Raises:
        EvaluationError: it is not installed.
    """
    if find_spec(name) is None:
        raise EvaluationError(
            f"evaluation: the recipe has {purpose}, which needs the package {name}, and it is not "
            "installed. Install it with `uv sync --group harness` or `pip install "
            "'glm-quant[harness]'`, or take it out of the recipe."
        )


def measure_harness(model: Any, tokenizer: Any, settings: HarnessSettings) -> Harness:
    """Do what `mlx_lm.evaluate` does, with a model that is loaded.

    Args:
        model: a model of mlx-lm.
        tokenizer: its tokenizer.
        settings: the command's options.

    Raises:
        EvaluationError: a task or its data cannot be had.
    """
    from lm_eval import simple_evaluate

    manager = _task_manager(settings.tasks)
    mx.random.seed(settings.seed)
    lm = _language_model(model, tokenizer, settings)
    with TemporaryDirectory(prefix="glm-quant-harness-") as cache:
        try:
            results: Any = cast("Any", simple_evaluate)(
                model=lm,
                tasks=[
                    str(write_task(name, data_file(settings.files[name]), Path(cache), manager))
                    if name in settings.files
                    else name
                    for name in settings.tasks
                ],
                task_manager=manager,
                apply_chat_template=lm.use_chat_template,
                num_fewshot=settings.num_shots,
                limit=settings.limit,
                random_seed=settings.seed,
                numpy_random_seed=settings.seed,
                torch_random_seed=settings.seed,
                fewshot_random_seed=settings.seed,
            )
        except (OSError, ValueError, KeyError) as error:  # what the harness and datasets raise
            raise EvaluationError(
                f"evaluation.harness: {', '.join(settings.tasks)} cannot be run ({error}). Without "
                "a network, name a file of JSON lines for each task in harness.files."
            ) from error
    return Harness(
        version=version("lm_eval"),
        shots=settings.num_shots,
        limit=settings.limit,
        seed=settings.seed,
        chat_template=bool(lm.use_chat_template),
        method=(
            f"mlx_lm.evaluate with lm-evaluation-harness {version('lm_eval')}: "
            f"{'the tasks’ own number of' if settings.num_shots is None else settings.num_shots} "
            f"shots, {'all' if settings.limit is None else f'at most {settings.limit:,}'} items, "
            f"seed {settings.seed}, chat template {'on' if lm.use_chat_template else 'off'}"
        ),
        tasks=[_task_result(name, results, settings) for name in results["samples"]],
    )


def _task_manager(tasks: Sequence[str]) -> Any:
    """Return the harness's list of tasks; only of these, since reading all takes long."""
    from lm_eval import tasks as shipped

    folders: list[str | Path] = [
        folder for name in tasks if (folder := Path(shipped.__path__[0]) / name).is_dir()
    ]
    few = shipped.TaskManager(include_path=folders, include_defaults=False)
    return few if all(name in few.task_index for name in tasks) else shipped.TaskManager()


def _language_model(model: Any, tokenizer: Any, settings: HarnessSettings) -> Any:
    """Return the command's own model class around a model that is loaded."""
    from mlx_lm import evaluate as peer

    from glm_quant.evaluation.mlx_lm_protocols import replaced

    make = cast("Any", peer.MLXLM)
    with replaced(peer, "load", lambda *_args, **_options: (model, tokenizer)):
        return make("", batch_size=settings.batch_size, use_chat_template=settings.chat_template)


def write_task(name: str, file: Path, folder: Path, manager: Any) -> Path:
    """Write a task of the harness that takes its items from a file; the command takes it too.

    Args:
        name: the harness's name of the task.
        file: JSON lines in the schema of the task's dataset.
        folder: where the task and the cache of its data are put.
        manager: the harness's TaskManager.

    Raises:
        EvaluationError: the harness has no such task.
    """
    entry = manager.task_index.get(name)
    if entry is None or entry.yaml_path is None:
        raise EvaluationError(
            f"evaluation.harness: files names the task {name!r}, which lm-evaluation-harness "
            f"{version('lm_eval')} does not have as a file. `lm_eval ls tasks` lists those it has."
        )
    task = {
        "include": str(entry.yaml_path),
        "task": name,
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {"validation": str(file.absolute())},
            "cache_dir": str(folder),
        },
        "training_split": None,
        "validation_split": "validation",
        "test_split": None,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(task), encoding="utf-8")
    return path


def _task_result(name: str, results: Mapping[str, Any], settings: HarnessSettings) -> HarnessTask:
    """Return what the harness found on one task."""
    result: Mapping[str, Any] = results["results"][name]
    scores = [
        HarnessScore(
            metric=metric,
            value=float(value),
            standard_error=_error(result.get(f"{metric}_stderr,{kind}")),
        )
        for metric, _, kind, value in (
            (*key.partition(","), value) for key, value in result.items()
        )
        if kind and not metric.endswith("_stderr") and isinstance(value, int | float)
    ]
    metric_name = settings.metrics.get(name, _DEFAULT_METRIC)
    names = [score.metric for score in scores]
    if metric_name not in names:
        raise EvaluationError(
            f"evaluation.harness: {name} has no metric {metric_name!r} but {', '.join(names)}. "
            "Name one of them in harness.metrics."
        )
    file = data_file(settings.files[name]) if name in settings.files else None
    config: Mapping[str, Any] = results["configs"][name]
    return HarnessTask(
        task=name,
        version=str(results["versions"][name]),
        dataset=str(config.get("dataset_path")) if file is None else file.name,
        dataset_sha256=None if file is None else sha256_file(file),
        metric=metric_name,
        scores=scores,
        items=[
            float(sample[metric_name])
            for sample in sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
        ],
    )


def _error(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None
