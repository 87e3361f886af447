"""The model card: README.md and its charts, from records and nothing else.

The Hub's Markdown strikes text through between two bare tildes and
drops what looks like a tag, so text that comes from outside goes through `escape`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from jinja2 import Environment, StrictUndefined

from glm_quant.artifact import write_atomic
from glm_quant.evaluation.divergence_record import DivergenceRecord, Estimate
from glm_quant.evaluation.records import Comparison, EvaluationRecord, Measurements
from glm_quant.report import benchmarks, charts
from glm_quant.report import format as say
from glm_quant.report.correctness import ParityRow, parity_value
from glm_quant.report.front_matter import front_matter
from glm_quant.report.inputs import (
    BuildFacts,
    CardInputs,
    PlanFacts,
    SourceFacts,
    missing_record,
)
from glm_quant.report.memory import (
    active_params,
    machine_bytes,
    machine_fits,
    machines,
    memory_need,
    memory_needs,
)
from glm_quant.report.prefill import CHUNK
from glm_quant.report.published import builds_of, public_builds
from glm_quant.report.quality_charts import (
    Point,
    bits_chart,
    divergence_chart,
    layers_chart,
    needle_chart,
)
from glm_quant.report.size_charts import footprint_chart, memory_chart, recipe_chart

__all__ = ["BuildFacts", "CardInputs", "PlanFacts", "SourceFacts", "render_card", "write_card"]

ASSETS = "assets"
CARD_NAME = "README.md"


@dataclass(frozen=True)
class _Facts:
    """The inputs of a card that has everything."""

    inputs: CardInputs
    source: SourceFacts
    plan: PlanFacts
    build: BuildFacts
    parity: tuple[ParityRow, ...]
    divergence: DivergenceRecord
    evaluation: EvaluationRecord

    @property
    def measured(self) -> Measurements:
        """What was measured of this build."""
        return self.evaluation.measurements

    @property
    def base_model(self) -> str | None:
        """The Hub's name of the model that was quantized, where it has one."""
        named_models = self.inputs.recipe.publish.base_model
        if named_models is None and self.source.uri.startswith("hf://"):
            return self.source.uri.removeprefix("hf://").partition("@")[0]
        return named_models

    def params_of(self, group: str) -> int:
        """Return the parameters of a component group."""
        return sum(totals.params for totals in self.plan.groups if totals.group == group)


def write_card(inputs: CardInputs, folder: Path) -> list[str]:
    """Write README.md and `assets/` into a finished build.

    Args:
        inputs: the records' contents.
        folder: the build.

    Returns:
        The files written, relative to `folder`, sorted.

    Raises:
        CardError: a record is missing; it is named.
    """
    facts = _require(inputs)
    shown = make_charts(inputs)
    written: list[str] = []
    for chart in shown:
        for theme in (charts.LIGHT, charts.DARK):
            charts.render(chart, theme, folder / ASSETS)
            written.append(f"{ASSETS}/{chart.file(theme)}")
    write_atomic(folder / CARD_NAME, _text(facts, shown).encode())
    return sorted([*written, CARD_NAME])


def render_card(inputs: CardInputs) -> str:
    """Return the text of README.md.

    Raises:
        CardError: a record is missing; it is named.
    """
    return _text(_require(inputs), make_charts(inputs))


def make_charts(inputs: CardInputs) -> list[charts.Chart]:
    """Return the charts of a card, in its order.

    Raises:
        CardError: a record is missing; it is named.
    """
    facts = _require(inputs)
    plan, needle = facts.plan, facts.measured.needle
    needs = memory_needs(plan.geometry, plan.tensor_bytes, plan.context_limit)
    shown = [recipe_chart(plan.groups), divergence_chart(facts.divergence.rows)]
    label = f"This build, {plan.bits_per_weight:.2f} bpw"
    shown.append(footprint_chart(label, plan.tensor_bytes, _other_sizes(facts)))
    if needle is not None:
        shown.append(needle_chart(needle))
    if len(inputs.layer_errors) > 1:
        shown.append(layers_chart(inputs.layer_errors))
    shown += _kl_by_bits(facts) or _perplexity_by_size(facts)
    return [*shown, memory_chart(needs)]


def _other_sizes(facts: _Facts) -> list[tuple[str, float]]:
    """Return name and bytes of what a build is measured against: builds, or else the source."""
    public = [(build.name, build.size_gb * 1e9) for build in builds_of(facts.plan.params)]
    if not public:
        public = [("The source", float(facts.source.size_bytes))]
    baselines = facts.evaluation.baselines
    return public + [(each.name, each.measurements.load.mlx_bytes) for each in baselines]


def _kl_by_bits(facts: _Facts) -> list[charts.Chart]:
    """Chart the baselines whose KL was measured on the same tokens: builds of the same source."""
    losses = _losses(facts, facts.divergence.comparisons, "mean_kl")
    points = [
        Point(name, bits, loss, f"{bits:.2f} bpw · {loss:.4f}")
        for name, loaded, loss in losses
        for bits in [loaded * 8 / facts.plan.params]
    ]
    title, labels = "KL to the source by bits per weight", ("bits per weight", "mean KL, nats")
    return [bits_chart(title, labels, points[0], points[1:])] if points else []


def _perplexity_by_size(facts: _Facts) -> list[charts.Chart]:
    """Chart the baselines whose perplexity is of the same tokens, whatever they are builds of."""
    losses = _losses(facts, facts.evaluation.comparisons, "perplexity")
    points = [
        Point(name, loaded / 1e9, loss, f"{say.size(loaded)} · {loss:.3f}")
        for name, loaded, loss in losses
    ]
    title, labels = "Perplexity by size in memory", ("GB", "perplexity, strided")
    return [bits_chart(title, labels, points[0], points[1:])] if points else []


def _losses(
    facts: _Facts, comparisons: Sequence[Comparison], measure: str
) -> list[tuple[str, int, float]]:
    """Return name, bytes in memory after loading, and a measure: this build's, the baselines'.

    Empty where no baseline has the measure.
    """
    by_baseline = {each.baseline: each for each in comparisons if each.measure == measure}
    others = [
        (each.name, each.measurements.load.mlx_bytes, by_baseline[each.name].baseline_value)
        for each in facts.evaluation.baselines
        if each.name in by_baseline
    ]
    if not others:
        return []
    build_loss = next(iter(by_baseline.values())).value
    return [("this build", facts.measured.load.mlx_bytes, build_loss), *others]


def escape(text: str) -> str:
    """Return text from outside so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_~|\[\]])", r"\\\1", text).replace("<", "&lt;").replace("\n", " ")


def _require(inputs: CardInputs) -> _Facts:
    source, plan, build = inputs.source, inputs.plan, inputs.build
    parity, divergence, evaluation = inputs.parity, inputs.divergence, inputs.evaluation
    if source and plan and build and parity and divergence and evaluation:
        return _Facts(inputs, source, plan, build, parity, divergence, evaluation)
    needed = {
        "download": source, "plan": plan, "assemble": build, "parity": parity,
        "divergence": divergence, "evaluate": evaluation
    }  # fmt: skip
    missing = next(name for name, value in needed.items() if not value)
    raise missing_record(inputs.name, missing)


def _text(facts: _Facts, shown: Sequence[charts.Chart]) -> str:
    environment = Environment(
        undefined=StrictUndefined,
        autoescape=False,  # noqa: S701 - Markdown, not HTML; `escape` takes what comes from outside
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "size": say.size,
        "count": say.count,
        "percent": say.percent,
        "tokens": say.tokens,
        "about_tokens": say.about_tokens,
        "title": say.group_title,
        "schemes": say.schemes,
        "and_list": say.and_list,
        "escape": escape,
        "figure": _figure,
        "estimate": _estimate,
        "bucket": say.bucket,
        "parity_value": parity_value,
        "measure_name": partial(benchmarks.measure_name, measured=facts.measured),
        "parity_bound": _parity_bound,
        "fit_text": _fit_text,
        "gibibytes": lambda size_bytes: f"{size_bytes / 2**30:,.1f} GiB",
    }
    source = files("glm_quant.report").joinpath("card.md.jinja").read_text(encoding="utf-8")
    body = _unbroken(environment.from_string(source).render(_context(facts, shown)))
    inputs = facts.inputs
    metadata = front_matter(
        inputs.name,
        inputs.recipe,
        facts.plan,
        facts.measured,
        facts.divergence,
        facts.base_model,
    )
    front = metadata.to_yaml(line_break="\n")
    card = ModelCard(f"---\n{front}\n---\n\n{body.strip()}\n")
    return str(card)


def _unbroken(text: str) -> str:
    """Return Markdown whose numbers stay on a line with units, errors, exponents, but for code."""
    parts = re.split(r"(```.*?```|`[^`\n]*`)", text, flags=re.DOTALL)
    for i in range(0, len(parts), 2):
        joined = re.sub(r"(?<=\d) (?=%|±|[kMGT]B\b|GiB\b)|(?<=±) (?=\d)", "\u00a0", parts[i])
        parts[i] = re.sub(r"(?<=\de)-(?=\d)", "\u2011", joined)
    return "".join(parts)


def _context(facts: _Facts, shown: Sequence[charts.Chart]) -> dict[str, Any]:
    plan, geometry = facts.plan, facts.plan.geometry
    routed = facts.params_of("routed_experts")
    embeddings = facts.params_of("embeddings")
    limit = plan.context_limit or 32 << 10
    short = memory_need(geometry, plan.tensor_bytes, min(8192, limit))
    public = benchmarks.public_columns(facts.evaluation, plan.params)
    holding = [g for g in machines().gigabytes if machine_bytes(g) > short.total_bytes]
    return {
        "name": facts.inputs.name,
        "recipe": facts.inputs.recipe,
        "command": facts.inputs.command,
        "source": facts.source,
        "plan": plan,
        "geometry": geometry,
        "build": facts.build,
        "parity": facts.parity,
        "divergence": facts.divergence,
        "measured": facts.measured,
        "base_model": facts.base_model,
        "active": active_params(geometry, plan.params, routed, embeddings),
        "full_layers": geometry.indexer_types.count("full"),
        "needs": memory_needs(geometry, plan.tensor_bytes, limit),
        "short": short,
        "smallest": holding[0] if holding else None,
        "fits": machine_fits(geometry, plan.tensor_bytes, limit),
        "machine_bytes": machine_bytes,
        "machines": machines(),
        "chunk": CHUNK,
        "charts": {chart.name: chart for chart in shown},
        "builds": public_builds() if builds_of(plan.params) else None,
        "public": public,
        "baselines": [baseline.name for baseline in facts.evaluation.baselines],
        "scores": benchmarks.rows(facts.evaluation, public),
        "paired": benchmarks.paired([*facts.divergence.comparisons, *facts.evaluation.comparisons]),
    }


def _figure(chart: charts.Chart) -> str:
    """Return both pictures of a chart: the Hub shows the one whose address names its mode."""
    alt = escape(chart.alt)
    return "\n".join(
        f"![{alt}]({ASSETS}/{chart.file(theme)}#hf-{mode}-mode-only)"
        for theme, mode in ((charts.LIGHT, "light"), (charts.DARK, "dark"))
    )


def _estimate(estimate: Estimate, digits: int = 3) -> str:
    return say.with_error(estimate.value, estimate.standard_error, digits)


def _parity_bound(row: ParityRow) -> str:
    if row.bound is None:
        return "none"
    return f"≥ {say.percent(row.bound)}" if row.at_least else f"≤ {row.bound:g}"


def _fit_text(context: int | None) -> str:
    if context is None:
        return "not with these dims"
    return f"{say.about_tokens(context)} tokens" if context else "does not fit"
