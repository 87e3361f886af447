"""The parity record as rows of a table: what was compared, what came out, what was allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from glm_quant.report import format as say

if TYPE_CHECKING:
    # The package runs models: to show a table it need not be loaded (seconds, with torch).
    from glm_quant.parity.check import ParityRecord


@dataclass(frozen=True)
class ParityRow:
    """One comparison.

    Attributes:
        label: what was compared, in two or three words.
        measure: the same in full.
        value: what came out.
        bound: what the recipe allows, None where nothing was demanded.
        how: how it was measured.
        of_build: whether the quantized build was compared, rather than the runtime alone.
        at_least: whether `bound` is a least value rather than a most.
    """

    label: str
    measure: str
    value: float
    bound: float | None
    how: str
    of_build: bool = False
    at_least: bool = False


def parity_rows(record: ParityRecord) -> tuple[ParityRow, ...]:
    """Return the record's comparisons, the runtime's first, then the build's."""
    return (*_runtime(record), *_build(record))


def layer_errors(record: ParityRecord) -> tuple[float, ...]:
    """Return the build's relative error after each layer; empty unless every layer has one."""
    errors = [row.build_error for row in record.layers]
    return tuple(error for error in errors if error is not None) if None not in errors else ()


def _runtime(record: ParityRecord) -> list[ParityRow]:
    most = record.settings.max_logit_error
    prompt = f"{record.tokens:,} {record.prompt} tokens"
    rows = [
        ParityRow(
            "layers",
            "Layers, unquantized: largest error of an attention or MLP block",
            record.max_layer_error,
            record.settings.max_layer_error,
            f"{len(record.layers)} layers, each on the reference's own input, {prompt}",
        )
    ]
    if record.logits is None:
        return rows
    comparisons = (
        ("logits, short", f"context up to {record.index_topk:,} tokens", record.logits.below_topk),
        ("logits, long", "longer context, where the indexer selects", record.logits.above_topk),
        ("logits, cached", "prefill in chunks, then token by token", record.logits.cached),
    )
    for label, where, value in comparisons:
        how = f"every position, {prompt}"
        rows.append(ParityRow(label, f"Logits, unquantized: {where}", value, most, how))
    return rows


def _build(record: ParityRecord) -> list[ParityRow]:
    limits = {bound.measure: bound for bound in record.settings.bounds}
    how = f"this build against the source, {record.tokens:,} {record.prompt} tokens, all positions"
    rows: list[ParityRow] = []
    for name, value, key in (
        ("mean", record.mean_kl, "mean_kl"),
        ("largest", record.max_kl, "max_kl"),
    ):
        if value is not None:
            measure = f"KL divergence to the source, {name}, nats"
            bound = limits[key].max if key in limits else None
            rows.append(ParityRow(f"KL, {name}", measure, value, bound, how, of_build=True))
    if record.top1_agreement is not None:
        measure = "Same most likely token as the source"
        value, least = record.top1_agreement, limits.get("top1_agreement")
        bound = least.min if least else None
        row = ParityRow("top-1 agreement", measure, value, bound, how, True, at_least=True)
        rows.append(row)
    return rows


def parity_value(row: ParityRow) -> str:
    """Return a comparison's value: a share as percent, a small error with its power of ten."""
    if row.at_least:
        return say.percent(row.value)
    return f"{row.value:.4f}" if row.value >= 1e-3 else f"{row.value:.1e}"
