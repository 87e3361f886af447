"""What a build and its baselines scored: rows with a column each, and differences with their error.

A figure of another text, length or machine says nothing here, so a
baseline that was measured otherwise has no cell in that row.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from glm_quant.evaluation.peer_records import HarnessTask
from glm_quant.evaluation.records import Comparison, EvaluationRecord, Measurements
from glm_quant.report import format as say
from glm_quant.report.published import PublicBuild, builds_of, comparable

NOTHING = "–"

_TASKS = {"hellaswag": "HellaSwag", "piqa": "PIQA", "winogrande": "WinoGrande"}
_MEASURES = {
    "mean_kl": "KL to the source, mean",
    "p99_kl": "KL to the source, 99 %",
    "top1_agreement": "same top token as the source",
    "nll_difference": "loss beside the source's",
    "perplexity": "perplexity, strided",
    "peer_perplexity": "perplexity, as mlx_lm.perplexity",
    "needle": "needle retrieval",
    "loops": "outputs that end in a loop",
    "repeated_share": "repeated share of the worst output",
    "longest_repeat": "longest repeat in tokens",
    "load_seconds": "load time in seconds",
    "peak_rss_gb": "resident memory in GB",
    "mlx_peak_gb": "MLX's peak memory in GB",
}


@dataclass(frozen=True)
class Row:
    """One figure: its name, a cell of each build, this one's last, and how it was measured."""

    name: str
    cells: tuple[str, ...]
    how: str


@dataclass(frozen=True)
class Figure:
    """A figure of one build.

    Attributes:
        how: it was measured.
        of_machine: it holds for the machine it was measured on.
        published_as: its name among the figures of public builds.
    """

    text: str
    how: str = ""
    of_machine: bool = False
    published_as: str = ""


def public_columns(record: EvaluationRecord, params: int) -> list[PublicBuild]:
    """Return the public builds of the same model that have a figure of the same protocol."""
    same = comparable(record.measurements)
    return [build for build in builds_of(params) if same & build.figures.keys()]


def rows(record: EvaluationRecord, public: Sequence[PublicBuild]) -> list[Row]:
    """Return every figure of this build, beside the public builds' and the baselines'."""
    own, same = record.measurements, comparable(record.measurements)
    table: list[Row] = []
    others = [(each.measurements, figures(each.measurements)) for each in record.baselines]
    for name, figure in figures(own).items():
        published = figure.published_as if figure.published_as in same else ""
        published_figures = [build.figures.get(published) for build in public]
        cells = [NOTHING if value is None else f"{value:.3f}" for value in published_figures]
        for measured, baseline_figures in others:
            known = baseline_figures.get(name)
            elsewhere = figure.of_machine and measured.machine != own.machine
            alike = known is not None and known.how == figure.how and not elsewhere
            cells.append(known.text if known is not None and alike else NOTHING)
        table.append(Row(name, (*cells, figure.text), figure.how))
    return table


def figures(measured: Measurements) -> dict[str, Figure]:
    """Return a build's figures under the names of their rows."""
    return {**_losses(measured), **_tasks(measured), **_outputs(measured), **_speeds(measured)}


def _losses(measured: Measurements) -> dict[str, Figure]:
    by_name: dict[str, Figure] = {}
    for each in measured.perplexity:
        how = f"{each.tokens:,} tokens; {each.method}; text sha256 {each.text_sha256[:16]}"
        name = f"Perplexity, strided, {each.text}"
        by_name[name] = Figure(say.with_error(each.value, each.standard_error), how)
    peer = measured.peer_perplexity
    if peer is not None:
        how = (
            f"as mlx_lm.perplexity does it: {peer.samples:,} sequences of "
            f"{peer.sequence_length:,} tokens, seed {peer.seed}"
        )
        name = f"Perplexity, {peer.dataset}"
        text = say.with_error(peer.value, peer.standard_error)
        by_name[name] = Figure(text, how, published_as="peer_perplexity")
    return by_name


def _tasks(measured: Measurements) -> dict[str, Figure]:
    harness = measured.harness
    if harness is None:
        return {}
    by_name: dict[str, Figure] = {}
    shots = "the task's own" if harness.shots is None else str(harness.shots)
    for task in harness.tasks:
        how = (
            f"lm-evaluation-harness {harness.version}, task version {task.version}, {shots} shots, "
            f"{len(task.items):,} items of {task.dataset}, seed {harness.seed}"
        )
        name = f"{_task_name(task)} ({task.score.metric})"
        text = say.with_error(task.score.value, task.score.standard_error)
        by_name[name] = Figure(text, how, published_as=task.task)
    return by_name


def _outputs(measured: Measurements) -> dict[str, Figure]:
    by_name: dict[str, Figure] = {}
    needle, coherence = measured.needle, measured.coherence
    if needle is not None:
        low, high = needle.interval()
        text = f"{say.percent(needle.score)} ({say.percent(low)} to {say.percent(high)})"
        how = f"{len(needle.trials):,} prompts, 95 % interval; {needle.method}"
        by_name["Needle retrieval"] = Figure(text, how)
    if coherence is not None:
        tokens = max(output.tokens for output in coherence.outputs)
        how = f"up to {tokens:,} tokens each; {coherence.method}"
        text = f"{coherence.loops} of {len(coherence.outputs)}"
        by_name["Long outputs that end in a loop"] = Figure(text, how)
        share = say.percent(coherence.repeated_share)
        how = f"of {coherence.ngram}-grams, in the worst output"
        by_name["Repeated share of long outputs"] = Figure(share, how)
    return by_name


def _speeds(measured: Measurements) -> dict[str, Figure]:
    by_name: dict[str, Figure] = {}
    for speed in measured.speed:
        after = f"after {speed.prompt_tokens:,} tokens"
        how = "" if by_name else f"greedy, one sequence, {speed.generated_tokens:,} tokens made"
        by_name[f"Generation {after}, tok/s"] = Figure(f"{speed.decode_rate:.2f}", how, True)
    return by_name


def _task_name(task: HarnessTask) -> str:
    """Return a task's name; with other items than its own it is but the task's protocol."""
    name = _TASKS.get(task.task, task.task)
    return name if task.dataset_sha256 is None else f"{task.dataset}, asked as {name}"


def measure_name(comparison: Comparison, measured: Measurements) -> str:
    """Return a comparison's measure as a reader knows it.

    Args:
        comparison: of this build with another.
        measured: what was measured of this build.
    """
    kind, _, which = comparison.measure.partition("/")
    if kind == "harness" and measured.harness:
        return next(_task_name(task) for task in measured.harness.tasks if task.task == which)
    if kind in ("prefill", "decode"):
        return f"{kind} after {int(which):,} tokens, tok/s"
    name = _MEASURES.get(kind, kind)
    return f"{name}, {which}" if which else name


def paired(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons whose difference has an error: those that were taken pair by pair."""
    return [each for each in comparisons if each.standard_error is not None]
