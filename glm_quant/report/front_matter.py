"""The card's metadata: what the Hub reads of a build, as huggingface_hub writes it."""

from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.records import Measurements
from glm_quant.recipe import PublishSettings, Recipe
from glm_quant.report.inputs import PlanFacts

# Licences of GLM releases that the Hub knows by identifier; any other is "other" with a name.
_HUB_LICENSES = ("mit", "apache-2.0")
_TASK = "text-generation"


def front_matter(
    name: str,
    recipe: Recipe,
    plan: PlanFacts,
    measured: Measurements,
    divergence: DivergenceRecord,
    base_model: str | None,
) -> ModelCardData:
    """Return the metadata.

    Args:
        name: the build's.
        recipe: with licence and languages.
        plan: for tags and quantization.
        measured: results.
        divergence: results too.
        base_model: the Hub's name of what was quantized, where it has one.
    """
    extra: dict[str, Any] = {"quantization": _quantization(plan)}
    if base_model:
        extra["base_model_relation"] = "quantized"
    return ModelCardData(
        language=list(recipe.publish.languages),
        **_license(recipe.publish),
        library_name="mlx",
        pipeline_tag=_TASK,
        tags=_tags(plan),
        base_model=base_model,
        model_name=name,
        eval_results=[*_losses(measured), *_scores(measured), *_divergences(divergence)],
        **extra,
    )


def _license(publish: PublishSettings) -> dict[str, Any]:
    if publish.license in _HUB_LICENSES:
        return {"license": publish.license}
    return {"license": "other", "license_name": publish.license, "license_link": "LICENSE"}


def main_scheme(plan: PlanFacts) -> str:
    """Return the scheme of most parameters, such as "2-bit g64 search"."""
    by_scheme: dict[str, int] = {}
    for group in plan.groups:
        for scheme, params in group.schemes.items():
            by_scheme[scheme] = by_scheme.get(scheme, 0) + params
    return max(by_scheme, key=lambda scheme: by_scheme[scheme])


def _quantization(plan: PlanFacts) -> dict[str, Any]:
    """Return how most parameters are stored, under the names of config.json, and the mean."""
    quantization: dict[str, Any] = {"bits_per_weight": round(plan.bits_per_weight, 5)}
    bits, _, rest = main_scheme(plan).partition("-bit")
    if rest:
        group_size = rest.strip().partition(" ")[0].removeprefix("g")
        quantization = {"bits": int(bits), "group_size": int(group_size), **quantization}
    return quantization


def _tags(plan: PlanFacts) -> list[str]:
    schemes = {scheme for group in plan.groups for scheme in group.schemes}
    largest = main_scheme(plan)
    bits = [largest.partition(" ")[0]] if "-bit" in largest else []
    mixed = ["mixed-precision"] if sum("-bit" in scheme for scheme in schemes) > 1 else []
    return ["mlx", "glm_moe_dsa", "glm", "moe", "quantized", *mixed, *bits, "apple-silicon",
            "conversational"]  # fmt: skip


def _result(
    dataset: tuple[str, str], arguments: dict[str, Any], metric: tuple[str, str], value: float
) -> EvalResult:
    """Return a result; the Hub's client joins those whose dataset and arguments are equal."""
    return EvalResult(
        task_type=_TASK,
        dataset_type=dataset[0],
        dataset_name=dataset[1],
        dataset_args=arguments,
        metric_type=metric[0],
        metric_name=metric[1],
        metric_value=round(value, 4),
    )


def _losses(measured: Measurements) -> list[EvalResult]:
    results = [
        _result(
            ("text", each.text),
            {"sha256": each.text_sha256, "tokens": each.tokens},
            ("perplexity", f"perplexity (context {each.context}, stride {each.stride})"),
            each.value,
        )
        for each in measured.perplexity
    ]
    peer = measured.peer_perplexity
    if peer is not None:
        arguments = {
            "samples": peer.samples,
            "sequence_length": peer.sequence_length,
            "seed": peer.seed,
        }
        dataset = (peer.dataset, peer.dataset)
        metric = ("perplexity", "perplexity (mlx_lm.perplexity)")
        results.append(_result(dataset, arguments, metric, peer.value))
    return results


def _scores(measured: Measurements) -> list[EvalResult]:
    results: list[EvalResult] = []
    if measured.needle is not None:
        score = measured.needle.score
        arguments = {"sha256": measured.needle.text_sha256}
        dataset = ("needle", "needle in a text")
        results.append(_result(dataset, arguments, ("accuracy", "facts retrieved"), score))
    if measured.harness is not None:
        for task in measured.harness.tasks:
            arguments = {"limit": measured.harness.limit, "shots": measured.harness.shots}
            metric = (task.score.metric, task.score.metric)
            is_local = task.dataset_sha256 is None
            dataset = (task.dataset, task.task if is_local else task.dataset)
            results.append(_result(dataset, arguments, metric, task.score.value))
    return results


def _divergences(record: DivergenceRecord) -> list[EvalResult]:
    row = record.row()
    lengths = [length for part in record.slices for length in part.lengths]
    arguments = {"tokens": sum(lengths), "context": max(lengths)}
    dataset = ("token-set", ", ".join(part.name for part in record.slices))
    values = (
        ("kl_divergence", "mean KL divergence to the bf16 source, nats", row.mean_kl.value),
        ("accuracy", "same most likely token as the source", row.top1_agreement.value),
    )
    return [_result(dataset, arguments, (kind, name), value) for kind, name, value in values]
