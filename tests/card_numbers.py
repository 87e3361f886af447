"""Re-derives a card's numbers from the JSON of its records, to find those that nobody measured.

What a record says in words (names, methods, digests, versions) stands on the card as it is. Each
other number has to be one of those that `derived` computes, or a constant with its reason.
"""

import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from glm_quant.model.geometry import Geometry
from glm_quant.recipe import RUNTIME_ERROR
from glm_quant.report.memory import machine_fits, memory_need, memory_needs

REPORT = Path(__file__).parents[1] / "glm_quant" / "report"

# Numbers that the card's own words have, with the reason why none of them is a measurement.
CONSTANTS = {
    "2": "2³⁰",
    "99 %": "the quantile's name",
    "95 %": "of the interval",
    "16": "bits of a cached value",
    "16-bit": "the same",
    "8": "--kv-bits 8",
    "8-bit": "the same",
    "32": "float32",
    "5": "the model's name",
    "0": "nothing",
}
_NUMBER = re.compile(
    r"(?<![\w.])[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?"
    r"(?:-bit|(?: (?:%|TB|GB|GiB|MB|kB|B)(?![\w-]))|[TBMKk](?![\w]))?"
)


def numbers(text: str) -> list[str]:
    """Return the numbers of a text, each with its unit."""
    return [number.rstrip(",") for number in _NUMBER.findall(text)]


def unexplained(card: str, workspace: Path) -> list[str]:
    """Return the numbers of a card's text that are not derived from the workspace's records."""
    records = read_records(workspace)
    text = _without_words(_prose(card), records)
    known = set(derived(records)) | CONSTANTS.keys()
    return [number for number in numbers(text) if number not in known]


def read_records(workspace: Path) -> dict[str, Any]:
    """Return the JSON of the records, the build's config and manifest, and the report's data."""
    names = ("download", "plan", "assemble", "parity", "divergence", "evaluate")
    found = {name: json.loads((workspace / f"records/{name}.json").read_text()) for name in names}
    for name in ("config", "manifest"):
        found[name] = json.loads((workspace / f"checkpoint/{name}.json").read_text())
    for name in ("machines", "builds"):
        found[name] = yaml.safe_load((REPORT / f"{name}.yaml").read_text())
    return found


def derived(records: dict[str, Any]) -> Iterator[str]:
    """Compute every number that a card may have, spelt as there, anew."""
    yield from _of_plan(records)
    yield from _of_divergence(records["divergence"])
    yield from _of_parity(records["parity"]["found"])
    yield from _of_evaluation(records["evaluate"])
    for each in (records["evaluate"], *records["evaluate"].get("baselines", [])):
        loaded = each["measurements"]["load"]["mlx_bytes"]
        yield from (bytes_of(loaded), f"{loaded * 8 / records['plan']['plan']['params']:.2f}")
    yield from _of_memory(records)


def _of_plan(records: dict[str, Any]) -> Iterator[str]:
    plan, source, config = records["plan"]["plan"], records["download"], records["config"]
    params, size = plan["params"], plan["tensor_bytes"]
    for digits in (2, 3):
        yield f"{size * 8 / params:.{digits}f}"
    yield from (count(params), bytes_of(size), f"{size / 2**30:,.1f} GiB", f"{plan['tensors']:,}")
    for group in plan["groups"]:
        yield from (count(group["params"]), percent(group["params"] / params))
        yield from (bytes_of(group["size_bytes"]), percent(group["size_bytes"] / size))
    first = max(plan["groups"], key=lambda group: group["params"])
    yield percent(1 - first["params"] / params)
    yield percent(1 - first["size_bytes"] / size)
    yield str(plan["dropped"])
    by_name = {group["group"]: group["params"] for group in plan["groups"]}
    idle = by_name.get("routed_experts", 0) * (
        1 - config["num_experts_per_tok"] / config["n_routed_experts"]
    )
    yield count(params - by_name.get("embeddings", 0) - round(idle))
    made = records["assemble"]["size_bytes"]
    yield from (bytes_of(made), bytes_of(source["size_bytes"]))
    yield percent(made / source["size_bytes"])
    yield from (f"{source['shards']}", f"{source['tensors']:,}", f"{len(plan['shards'])}")
    layers = config["num_hidden_layers"]
    yield from (str(layers), str(config["indexer_types"][:layers].count("full")))
    yield from (f"{config['index_topk']:,}", tokens(config["max_position_embeddings"]))


def _of_divergence(record: dict[str, Any]) -> Iterator[str]:
    for row in record["rows"]:
        kl, error = row["mean_kl"]["value"], row["mean_kl"]["standard_error"]
        yield from (f"{row['positions']:,}", f"{kl:.4f}", f"{kl:.3f}", f"{error or 0:.4f}")
        yield from (f"{row['median_kl']:.4f}", f"{row['p99_kl']:.3f}", f"{row['max_kl']:.2f}")
        yield percent(row["top1_agreement"]["value"])
        for name in ("reference_nll", "build_nll"):
            yield f"{math.exp(row[name]['value']):.3f}"
    gap = record["rows"][0]["nll_difference"]
    yield from (f"{gap['value']:+.4f}", f"{gap['standard_error'] or 0:.4f}")
    yield f"{record['index_topk']:,}"
    yield from _of_comparisons(record.get("comparisons", []))


def _of_comparisons(comparisons: Iterable[dict[str, Any]]) -> Iterator[str]:
    for each in comparisons:
        yield from (f"{each['value']:.4g}", f"{each['baseline_value']:.4g}")
        for name in ("value", "baseline_value"):
            yield from (f"{each[name]:.4f}", f"{each[name]:.3f}")
        yield f"{each['difference']:+.4g}"
        yield from (f"{each['standard_error'] or 0:.2g}", f"{each['pairs']:,}")


def _of_parity(found: dict[str, Any]) -> Iterator[str]:
    settings, logits = found["settings"], found["logits"] or {}
    values = [found["max_layer_error"], found["mean_kl"], found["max_kl"], *logits.values()]
    for value in values:
        if value is not None:
            yield f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"
    if found["top1_agreement"] is not None:
        yield percent(found["top1_agreement"])
    yield f"{RUNTIME_ERROR:g}"  # where a recipe gives no bound of its own
    for bound in settings["bounds"]:
        if bound["max"] is not None:
            yield f"{bound['max']:g}"
        if bound["min"] is not None:
            yield percent(bound["min"])
    yield from (str(len(found["layers"])), f"{found['tokens']:,}", f"{found['index_topk']:,}")
    for layer in found["layers"]:
        yield str(layer["layer"])
        if layer["build_error"] is not None:
            yield f"{layer['build_error']:.3f}"


def _of_evaluation(record: dict[str, Any]) -> Iterator[str]:
    for each in (record, *record.get("baselines", [])):
        yield from _of_measurements(each["measurements"])
    yield from _of_comparisons(record.get("comparisons", []))


def _of_measurements(measured: dict[str, Any]) -> Iterator[str]:
    peer, harness = measured.get("peer_perplexity"), measured.get("harness")
    losses = [*measured["perplexity"], *([peer] if peer else [])]
    tasks = harness["tasks"] if harness else []
    scores = [s for task in tasks for s in task["scores"] if s["metric"] == task["metric"]]
    for each in (*losses, *scores):
        yield from (f"{each['value']:.3f}", f"{each['standard_error'] or 0:.3f}")
    for each in measured["perplexity"]:
        yield from (f"{each['tokens']:,}", str(each["context"]), str(each["stride"]))
    if peer:
        yield from (f"{peer[name]:,}" for name in ("samples", "sequence_length", "seed"))
    if harness:
        yield from (str(harness["shots"]), str(harness["seed"]))
        yield from (f"{len(task['items']):,}" for task in tasks)
        yield from (task["version"] for task in tasks)
    if coherence := measured.get("coherence"):
        yield from _of_outputs(coherence)
    if measured["needle"]:
        yield from _of_needle(measured["needle"]["trials"])
    for speed in measured["speed"]:
        yield from (f"{speed['prompt_tokens']:,}", f"{speed['generated_tokens']:,}")
        decode = (speed["generated_tokens"] - 1) / speed["decode_seconds"]
        yield from (f"{decode:.1f}", f"{decode:.2f}", bytes_of(speed["mlx_peak_bytes"]))
        yield f"{speed['prompt_tokens'] / speed['prefill_seconds']:.1f}"
    yield from (bytes_of(measured["mlx_peak_bytes"]), bytes_of(measured["peak_rss_bytes"]))
    machine = measured["machine"]
    yield from (str(machine["cores"]), f"{machine['memory_bytes'] / 2**30:.0f} GB")
    yield f"{measured['load']['seconds']:.1f}"


def _of_outputs(coherence: dict[str, Any]) -> Iterator[str]:
    outputs = coherence["outputs"]
    loops = sum(output["loop_period"] is not None for output in outputs)
    yield from (str(loops), str(len(outputs)), str(coherence["ngram"]))
    yield percent(max(output["repeated_share"] for output in outputs))
    yield f"{max(output['tokens'] for output in outputs):,}"


def _of_needle(trials: list[dict[str, Any]]) -> Iterator[str]:
    n, hits = len(trials), sum(trial["retrieved"] for trial in trials)
    p, z = hits / n, 1.959964  # Wilson's interval
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    yield from (
        percent(p),
        percent(max(middle - half, 0)),
        percent(min(middle + half, 1)),
        f"{n:,}",
    )
    yield f"{max(t['prompt_tokens'] for t in trials if t['retrieved']):,}" if hits else "0"
    for length in {trial["length"] for trial in trials}:
        row = [trial["retrieved"] for trial in trials if trial["length"] == length]
        yield from (f"{length:,}", f"{sum(row) / len(row):.0%}", f"{sum(row) / len(row):.0%}"[:-1])


def _of_memory(records: dict[str, Any]) -> Iterator[str]:
    geometry = Geometry.from_config(records["config"])
    weights, limit = records["plan"]["plan"]["tensor_bytes"], records["config"].get(
        "max_position_embeddings", 32 << 10
    )  # fmt: skip
    needs = [
        *memory_needs(geometry, weights, limit),
        memory_need(geometry, weights, min(8192, limit)),
    ]
    known = records["machines"]
    for need in needs:
        sizes = [need.latent_bytes, need.indexer_bytes, need.prefill_bytes, need.total_bytes]
        yield from map(bytes_of, [*sizes, need.total_8bit_bytes or 0])
        yield tokens(need.context)
        for gigabytes in known["gigabytes"]:
            yield bytes_of(max((gigabytes << 30) - need.total_bytes, 0))
    first = needs[0]
    yield f"{first.latent_bytes // first.context:,}"
    yield f"{first.indexer_bytes // first.context:,}"
    yield f"{(first.cache_8bit_bytes or 0) // first.context:,}"
    for gigabytes in known["gigabytes"]:
        yield from (f"{gigabytes} GB", bytes_of(gigabytes << 30))
    for fit in machine_fits(geometry, weights, limit):
        for longest in (fit.by_default, fit.raised, fit.raised_8bit or 0):
            yield f"{longest / 2**20:.3g}M" if longest >= 2**20 else f"{longest >> 10}K"
    seen = known["wired_seen"]
    yield from (percent(known["wired_share"]), f"{known['reserved']} GiB", str(seen["wired"]))
    yield f"{seen['gigabytes']} GiB"
    yield "2,048"  # mlx-lm's chunk, which test_prefill.py holds against mlx-lm
    for build in records["builds"]["builds"]:
        yield bytes_of(build["size_gb"] * 1e9)
        yield from (f"{value:.3f}" for value in build.get("figures", {}).values())


def bytes_of(size: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= scale:
            return f"{_digits(size / scale)} {unit}"
    return f"{size:.0f} B"


def count(number: float) -> str:
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{_digits(number / scale)}{unit}"
    return f"{number:.0f}"


def _digits(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def percent(share: float) -> str:
    value = share * 100
    for least, digits in ((10, 1), (0.1, 2), (0.001, 3), (1e-9, 5)):
        if value >= least:
            return f"{value:.{digits}f} %"
    return "0 %"


def tokens(number: int) -> str:
    if number and number % 2**20 == 0:
        return f"{number >> 20}M"
    return f"{number >> 10}K" if number and number % 1024 == 0 else f"{number:,}"


def _prose(card: str) -> str:
    """Return a card's text without metadata, commands and addresses."""
    body = card.split("\n---\n", 1)[1]
    body = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
    body = re.sub(r"\]\([^)]*\)", "]", body)
    return (
        re.sub(r"\\(.)", r"\1", body)
        .replace("&lt;", "<")
        .replace("\u00a0", " ")
        .replace("\u2011", "-")
        .replace("**", "")
    )


def _without_words(text: str, records: dict[str, Any]) -> str:
    """Return a text without what the records say in words, longest first."""
    words = {word for word in _words(records) if re.search(r"\d", word)}
    words |= {word[:16] for word in words if re.fullmatch(r"[0-9a-f]{64}", word)}
    for word in sorted(words, key=len, reverse=True):
        # A bare number is no word; a version ("0.32.2") and a name ("2-bit g64") are.
        if not re.fullmatch(r"[\d.,]*", word) or word.count(".") > 1:
            text = text.replace(word, "")
    return text


def _words(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _words(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _words(inner)
    elif isinstance(value, str):
        yield value
