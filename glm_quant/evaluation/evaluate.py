"""Evaluate a build in a process of its own and hold it to the recipe's bounds."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from glm_quant import __version__
from glm_quant.artifact import Record, sha256_file
from glm_quant.child_process import ChildJob, Progress, run_in_child
from glm_quant.data import held_out_text
from glm_quant.errors import EvaluationError, RecipeError
from glm_quant.evaluation.baselines import Baseline, build_identity, open_baseline
from glm_quant.evaluation.data_files import data_file
from glm_quant.evaluation.figures import compare, figures, hold
from glm_quant.evaluation.harness import require_package
from glm_quant.evaluation.perplexity import digest_text
from glm_quant.evaluation.records import BaselineMeasurements, EvaluationRecord, Measurements
from glm_quant.evaluation.request import Request
from glm_quant.fingerprint import Canonical, fingerprint
from glm_quant.settings import EvaluationSettings

# Raise it when a measurement changes its meaning: records made before are then made anew.
VERSION = 2

_BUILT_IN_TEXT = "held-out text of Python's standard library"
# transformers, which mlx-lm takes its tokenizer from, imports torch wherever it is installed. No
# measurement computes with it, and it would add seconds and 250 MB to what is measured.
_JOB = ChildJob(
    "glm_quant.evaluation.measure:measure",
    Measurements,
    "evaluates the build",
    EvaluationError,
    blocked_modules=("torch",),
)
# What may change without anything being measured again.
_BOUNDS = {"bounds"}


class MeasurementsRecord(Record):
    """What the worker measured of one checkpoint, kept whatever the bounds say of it."""

    measurements: Measurements


def evaluation_inputs(
    checkpoint: Path, settings: EvaluationSettings, baselines: Mapping[str, str] | None = None
) -> Canonical:
    """Return everything that decides an evaluation's meaning: build, settings, text, versions.

    Args:
        checkpoint: the build.
        settings: what is measured, and the bounds.
        baselines: what it is compared with, by name.

    Raises:
        RecipeError: a text, a file or a baseline of the recipe cannot be read.
    """
    return {
        "measured": _measured_inputs(build_identity(checkpoint), settings),
        "bounds": settings.model_dump_json(include=_BOUNDS),
        "baselines": {each.name: each.identity for each in _opened(baselines)},
    }


def evaluate(
    checkpoint: Path,
    settings: EvaluationSettings,
    *,
    folder: Path | None = None,
    baselines: Mapping[str, str] | None = None,
    stage_fingerprint: str | None = None,
    progress: Progress | None = None,
) -> EvaluationRecord:
    """Measure a build, compare it with the baselines and check the bounds.

    Args:
        checkpoint: folder of a finished build.
        settings: what to measure, and the bounds.
        folder: where measurements are kept, so that another bound does not measure again.
        baselines: what to compare with, by name: see `open_baseline`.
        stage_fingerprint: what the record shall carry; default: that of `evaluation_inputs`.
        progress: called with tokens done and tokens to do.

    Raises:
        EvaluationError: a model crashed or could not be loaded, or the build broke a bound.
        RecipeError: a text, a file or a baseline of the recipe cannot be read.
    """
    require_measurable(settings, baselines)
    require_packages(settings)
    own = stage_fingerprint or fingerprint(evaluation_inputs(checkpoint, settings, baselines))
    measured = _measure(checkpoint, settings, folder, progress)
    others = [
        BaselineMeasurements(
            name=each.name,
            build=each.identity,
            measurements=_measure_baseline(each, settings, folder, progress),
        )
        for each in _opened(baselines)
    ]
    record = EvaluationRecord(
        fingerprint=own,
        measurements=measured,
        baselines=tuple(others),
        comparisons=tuple(
            comparison
            for other in others
            for comparison in compare(other.name, measured, other.measurements)
        ),
    )
    check_bounds(record, settings)
    return record


def require_measurable(
    settings: EvaluationSettings, baselines: Mapping[str, str] | None = None
) -> None:
    """Check that what will be measured can be read.

    Raises:
        RecipeError: a text, a file or a baseline of the recipe cannot be read.
    """
    perplexity_texts(settings)
    _file_digests(settings)
    _opened(baselines)


def require_packages(settings: EvaluationSettings) -> None:
    """Check that what will be measured with is installed.

    Raises:
        EvaluationError: an optional package is asked for and is not.
    """
    if settings.harness:
        require_package("lm_eval", "evaluation.harness")
    if settings.perplexity_datasets:
        require_package("datasets", "evaluation.perplexity_datasets")
    if settings.peer_perplexity and not settings.peer_perplexity.file:
        require_package("datasets", "evaluation.peer_perplexity, of a dataset of the Hub")


def check_bounds(record: EvaluationRecord, settings: EvaluationSettings) -> None:
    """Hold measurements to the recipe's bounds.

    Raises:
        EvaluationError: a bound is broken; names the measure and both numbers.
    """
    hold(settings.bounds, figures(record.measurements), record.comparisons, "evaluation")


def _measured_inputs(build: str, settings: EvaluationSettings) -> Canonical:
    """Return what decides measurements, whatever they are held to."""
    packages = ["mlx", "mlx-lm", *(["lm_eval"] if settings.harness else [])]
    return {
        "version": VERSION,
        "build": build,
        "settings": settings.model_dump_json(exclude=_BOUNDS),
        "texts": {name: digest_text(text) for name, text in perplexity_texts(settings).items()},
        "files": _file_digests(settings),
        "versions": [__version__, *(version(name) for name in packages)],
    }


def _measure(
    checkpoint: Path, settings: EvaluationSettings, folder: Path | None, progress: Progress | None
) -> Measurements:
    """Measure a checkpoint, or read what was measured of it before."""
    own = fingerprint(_measured_inputs(build_identity(checkpoint), settings))
    path = None if folder is None else folder / f"{own[:16]}.json"
    known = None if path is None else MeasurementsRecord.load(path)
    if known is not None and known.fingerprint == own:
        return known.measurements
    (name, text), *others = perplexity_texts(settings).items()
    request = Request(
        checkpoint=checkpoint, settings=settings, text_name=name, text=text, texts=dict(others)
    )
    measured = run_in_child(_JOB, request, checkpoint, progress)
    if path is not None:
        MeasurementsRecord(fingerprint=own, measurements=measured).save(path)
    return measured


def _measure_baseline(
    baseline: Baseline, settings: EvaluationSettings, folder: Path | None, progress: Progress | None
) -> Measurements:
    """Measure a baseline as the build is, or read what was measured so of it before."""
    if baseline.checkpoint is None:
        if baseline.evaluation is None:
            raise RecipeError(f"{baseline.place}: baseline {baseline.name!r} has no record.")
        return baseline.evaluation.measurements
    expected = fingerprint(_measured_inputs(build_identity(baseline.checkpoint), settings))
    path = baseline.place / "records" / "measurements" / f"{expected[:16]}.json"
    known = MeasurementsRecord.load(path)
    if known is not None and known.fingerprint == expected:
        return known.measurements
    return _measure(baseline.checkpoint, settings, folder, progress)


def _opened(baselines: Mapping[str, str] | None) -> list[Baseline]:
    return [open_baseline(name, place) for name, place in (baselines or {}).items()]


def perplexity_texts(settings: EvaluationSettings) -> dict[str, str]:
    """Return the local texts for perplexity by name; the first is that of `perplexity_text`.

    Raises:
        RecipeError: one cannot be read, or two have the same name.
    """
    texts: dict[str, str] = {}
    if settings.perplexity_text is None:
        texts[_BUILT_IN_TEXT] = held_out_text()
    else:
        path = Path(settings.perplexity_text).expanduser()
        texts[path.name] = _read(path, "perplexity_text")
    for name, file in settings.perplexity_texts.items():
        if name in texts:
            raise RecipeError(
                f"evaluation: perplexity_texts has {name!r}, which is the name of perplexity_text "
                "too. Name it otherwise."
            )
        texts[name] = _read(Path(file).expanduser(), f"perplexity_texts.{name}")
    return texts


def _read(path: Path, key: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: the recipe's {key} cannot be read ({error}).") from None


def _file_digests(settings: EvaluationSettings) -> dict[str, Canonical]:
    """Return the sha256 of the local data of the peers' protocols."""
    named = dict(settings.harness.files) if settings.harness else {}
    if settings.peer_perplexity and settings.peer_perplexity.file:
        named["peer_perplexity"] = settings.peer_perplexity.file
    digests: dict[str, Canonical] = {}
    for name, file in named.items():
        path = data_file(file)
        if not path.is_file():
            raise RecipeError(f"{path}: the recipe's data file for {name} is not there.")
        digests[name] = sha256_file(path)
    return digests
