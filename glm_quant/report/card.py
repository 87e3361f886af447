"""The model card: README.md and its charts, from records and nothing else.

What a reader would get wrong: the Hub's Markdown strikes text through between two bare tildes and
drops what looks like a tag, so text that comes from outside goes through `escape`.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from glm_quant.artifact import write_atomic
from glm_quant.errors import CardError
from glm_quant.evaluation.divergence_record import DivergenceRecord, Estimate
from glm_quant.evaluation.records import Measurements
from glm_quant.report import charts
from glm_quant.report import format as say
from glm_quant.report.correctness import ParityRow, parity_value
from glm_quant.report.inputs import BuildFacts, CardInputs, PlanFacts, SourceFacts
from glm_quant.report.memory import (
    RESERVED_BYTES,
    WIRED_SHARE,
    active_params,
    machine_bytes,
    machine_fits,
    memory_need,
    memory_needs,
)

__all__ = ["BuildFacts", "CardInputs", "PlanFacts", "SourceFacts", "render_card", "write_card"]

ASSETS = "assets"
CARD_NAME = "README.md"

# Licences of GLM releases that the Hub knows by identifier; any other is "other" with a name.
_HUB_LICENSES = ("mit", "apache-2.0")


@dataclass(frozen=True)
class _Facts:
    """The inputs of a card that has everything."""

    inputs: CardInputs
    source: SourceFacts
    plan: PlanFacts
    build: BuildFacts
    parity: tuple[ParityRow, ...]
    divergence: DivergenceRecord
    measured: Measurements

    @property
    def base_model(self) -> str | None:
        """The Hub's name of the model that was quantized, where it has one."""
        given = self.inputs.recipe.publish.base_model
        if given is None and self.source.uri.startswith("hf://"):
            return self.source.uri.removeprefix("hf://").partition("@")[0]
        return given

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
    shown = [charts.recipe_chart(plan.groups), charts.divergence_chart(facts.divergence.rows)]
    others = other_builds(plan.params)
    if others:
        own = f"This build, {plan.bits_per_weight:.2f} bpw"
        shown.append(charts.footprint_chart(own, plan.tensor_bytes, others))
    if needle is not None:
        shown.append(charts.needle_chart(needle))
    if len(inputs.layer_errors) > 1:
        shown.append(charts.layers_chart(inputs.layer_errors))
    return [*shown, charts.memory_chart(needs)]


def other_builds(params: int) -> list[tuple[str, float]]:
    """Return name and bytes of public builds of a model with so many parameters."""
    data = _builds()
    if params != data["params"]:
        return []
    return [(build["name"], build["size_gb"] * 1e9) for build in data["builds"]]


def missing_record(build: str, stage: str) -> CardError:
    """Return the refusal to tell of a build without the record of a stage."""
    return CardError(
        f"{build}: the card needs the record of stage {stage!r}, which is missing. Run the "
        "flow again: it does what is left, and the card states nothing that was not measured."
    )


def escape(text: str) -> str:
    """Return text from outside so that Markdown shows it as it is."""
    return re.sub(r"([\\`*_~|\[\]])", r"\\\1", text).replace("<", "&lt;").replace("\n", " ")


def _require(inputs: CardInputs) -> _Facts:
    source, plan, build = inputs.source, inputs.plan, inputs.build
    parity, divergence, evaluation = inputs.parity, inputs.divergence, inputs.evaluation
    if source and plan and build and parity and divergence and evaluation:
        return _Facts(inputs, source, plan, build, parity, divergence, evaluation.measurements)
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
        "bucket": _bucket,
        "parity_value": parity_value,
        "parity_bound": _parity_bound,
        "fit_text": _fit_text,
        "gibibytes": lambda size_bytes: f"{size_bytes / 2**30:,.1f} GiB",
    }
    source = files("glm_quant.report").joinpath("card.md.jinja").read_text(encoding="utf-8")
    body = environment.from_string(source).render(_context(facts, shown))
    front = front_matter(facts).to_yaml(line_break="\n")
    card = ModelCard(f"---\n{front}\n---\n\n{body.strip()}\n")
    return str(card)


def _context(facts: _Facts, shown: Sequence[charts.Chart]) -> dict[str, Any]:
    plan, geometry = facts.plan, facts.plan.geometry
    routed = facts.params_of("routed_experts")
    embeddings = facts.params_of("embeddings")
    limit = plan.context_limit or 32 << 10
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
        "short": memory_need(geometry, plan.tensor_bytes, min(8192, limit)),
        "fits": machine_fits(geometry, plan.tensor_bytes, limit),
        "machine_bytes": machine_bytes,
        "wired_share": WIRED_SHARE,
        "reserved_bytes": RESERVED_BYTES,
        "charts": {chart.name: chart for chart in shown},
        "builds": _builds(),
    }


def front_matter(facts: _Facts) -> ModelCardData:
    """Return the card's metadata."""
    publish = facts.inputs.recipe.publish
    known = publish.license in _HUB_LICENSES
    extra: dict[str, Any] = {"base_model_relation": "quantized"} if facts.base_model else {}
    return ModelCardData(
        language=list(publish.languages),
        license=publish.license if known else "other",
        license_name=None if known else publish.license,
        license_link=None if known else "LICENSE",
        library_name="mlx",
        pipeline_tag="text-generation",
        tags=_tags(facts),
        base_model=facts.base_model,
        model_name=facts.inputs.name,
        eval_results=[*_eval_results(facts.measured), *_divergence_results(facts.divergence)],
        **extra,
    )


def _tags(facts: _Facts) -> list[str]:
    """Return tags; the bits are those of most parameters."""
    by_scheme: dict[str, int] = {}
    for group in facts.plan.groups:
        for scheme, params in group.schemes.items():
            by_scheme[scheme] = by_scheme.get(scheme, 0) + params
    largest = max(by_scheme, key=lambda scheme: by_scheme[scheme])
    bits = [largest.partition(" ")[0]] if "-bit" in largest else []
    mixed = ["mixed-precision"] if sum("-bit" in scheme for scheme in by_scheme) > 1 else []
    return ["mlx", "glm_moe_dsa", "glm", "moe", "quantized", *mixed, *bits, "apple-silicon",
            "conversational"]  # fmt: skip


def _divergence_results(record: DivergenceRecord) -> list[EvalResult]:
    row = record.row()
    lengths = [length for part in record.slices for length in part.lengths]
    values = (
        ("kl_divergence", "mean KL divergence to the bf16 source, nats", row.mean_kl.value),
        ("accuracy", "same most likely token as the source", row.top1_agreement.value),
    )
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="token-set",  # its own: the Hub's client joins results of one type
            dataset_name=", ".join(part.name for part in record.slices),
            dataset_args={"tokens": sum(lengths), "context": max(lengths)},
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for kind, name, value in values
    ]


def _eval_results(measured: Measurements) -> list[EvalResult]:
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type="text",
            dataset_name=perplexity.text,
            dataset_args={"sha256": perplexity.text_sha256, "tokens": perplexity.tokens},
            metric_type="perplexity",
            metric_name=f"perplexity (context {perplexity.context}, stride {perplexity.stride})",
            metric_value=round(perplexity.value, 4),
        )
        for perplexity in measured.perplexity
    ]
    if measured.needle is not None:
        results.append(
            EvalResult(
                task_type="text-generation",
                dataset_type="needle",
                dataset_name="needle in a text",
                dataset_args={"sha256": measured.needle.text_sha256},
                metric_type="accuracy",
                metric_name="facts retrieved",
                metric_value=round(measured.needle.score, 4),
            )
        )
    return results


def _figure(chart: charts.Chart) -> str:
    alt = escape(chart.alt)
    return f"![{alt}]({ASSETS}/{chart.file(charts.LIGHT)})"


def _estimate(estimate: Estimate, digits: int = 3) -> str:
    error = estimate.standard_error
    return f"{estimate.value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _bucket(bucket: str, index_topk: int) -> str:
    if bucket == "all":
        return "all"
    return f"up to {index_topk:,}" if bucket == "below" else f"after {index_topk:,}"


def _parity_bound(row: ParityRow) -> str:
    if row.bound is None:
        return "none"
    return f"≥ {say.percent(row.bound)}" if row.at_least else f"≤ {row.bound:g}"


def _fit_text(context: int | None) -> str:
    if context is None:
        return "not with these dims"
    return f"{say.about_tokens(context)} tokens" if context else "does not fit"


def _builds() -> dict[str, Any]:
    text = files("glm_quant.report").joinpath("builds.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)
