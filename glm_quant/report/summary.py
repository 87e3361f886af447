"""Tables for the terminal: what a plan would make, and what a finished build came to."""

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from glm_quant.architectures.architecture import mlx_lm_version
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.records import EvaluationRecord
from glm_quant.quantize.outputs import Outputs
from glm_quant.quantize.plan import GroupTotals, Plan
from glm_quant.report import format as say
from glm_quant.report.correctness import ParityRow, parity_value
from glm_quant.report.inputs import CardInputs
from glm_quant.report.memory import memory_need


def plan_summary(
    plan: Plan,
    title: str,
    context_limit: int | None = None,
    outputs: Outputs | None = None,
) -> RenderableType:
    """Return a plan as a table with its totals.

    Args:
        plan: what would be made.
        title: recipe and source, for the heading.
        context_limit: config.json's max_position_embeddings, to state the memory at 8K tokens.
        outputs: those of the plan, to state what carrying it out takes.
    """
    shards = len(plan.shards)
    disk = sum(shard.size_bytes for shard in plan.shards)
    files = f"{shards} shard{'s' * (shards != 1)}, {say.size(disk)} on disk"
    lines = [
        f"{plan.architecture.model_type}, as {plan.architecture.module} of mlx-lm "
        f"{mlx_lm_version()} loads it"
        if plan.architecture
        else "glm_moe_dsa, with the runtime that travels along",
        f"{plan.params:,} parameters at {plan.bits_per_weight:.5f} bits per weight",
        f"{plan.tensor_bytes:,} bytes of tensors in {files}",
    ]
    if context_limit and plan.geometry:
        need = memory_need(plan.geometry, plan.tensor_bytes, min(8192, context_limit))
        lines.append(
            f"{say.size(need.total_bytes)} of memory to read {say.tokens(need.context)} tokens"
        )
    if outputs:
        lines.append(
            f"{len(outputs.source_order)} source shards are read in the order in which they are "
            f"stored; at most {outputs.most_open} of the outputs are open at a time"
        )
    if plan.dropped:
        reasons = ", ".join(f"{reason}: {n:,}" for reason, n in plan.drop_reasons.items())
        lines.append(f"{len(plan.dropped):,} tensors of the source are left out ({reasons})")
    lines += plan.warnings
    table = _groups(plan.groups(), plan.params, plan.tensor_bytes)
    return Group(Text(title, style="bold"), table, *(Text(line) for line in lines))


def result_summary(
    inputs: CardInputs, checkpoint: Path, published: Sequence[str] = ()
) -> RenderableType:
    """Return what a finished build came to: numbers first, then where it is.

    Args:
        inputs: what the card was made of; parts that are missing are left out.
        checkpoint: the build.
        published: where it was published.
    """
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in [
        *_made(inputs),
        *_proved(inputs.parity or ()),
        *divergence_rows(inputs.divergence),
        *measured_rows(inputs.evaluation),
        *comparison_rows(inputs),
    ]:
        table.add_row(name, value)
    table.add_row("checkpoint", str(checkpoint))
    if inputs.parity and inputs.evaluation:
        table.add_row("card", str(checkpoint / "README.md"))
    for target in published:
        table.add_row("published", target)
    head = Text(inputs.name, style="bold green")
    if inputs.plan is None:
        return Group(head, table)
    plan = inputs.plan
    return Group(head, _groups(plan.groups, plan.params, plan.tensor_bytes), table)


def _groups(groups: Sequence[GroupTotals], params: int, size_bytes: int) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_footer=True)
    table.add_column("component", "total")
    table.add_column("params", say.count(params), justify="right")
    table.add_column("share", justify="right", style="dim")
    table.add_column("scheme", f"{size_bytes * 8 / params:.3f} bpw")
    table.add_column("bytes", say.size(size_bytes), justify="right")
    table.add_column("share", justify="right", style="dim")
    for group in groups:
        table.add_row(
            say.group_title(group.group),
            say.count(group.params),
            say.percent(group.params / params),
            say.schemes(group.schemes),
            say.size(group.size_bytes),
            say.percent(group.size_bytes / size_bytes),
        )
    return table


def _made(inputs: CardInputs) -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    if inputs.build is not None:
        shards = inputs.build.shards
        rows.append(
            (
                "size",
                f"{say.size(inputs.build.size_bytes)} in {shards} shard{'s' * (shards != 1)}",
            )
        )
    return rows


def _proved(parity: Sequence[ParityRow]) -> list[tuple[str, str]]:
    """Return the runtime's largest error, and each figure of the build."""
    runtime = [row for row in parity if not row.of_build]
    rows: list[tuple[str, str]] = []
    if runtime:
        worst = max(runtime, key=lambda row: row.value)
        rows.append(("runtime", f"within {parity_value(worst)} of transformers, unquantized"))
    return [*rows, *((row.label, parity_value(row)) for row in parity if row.of_build)]


def divergence_rows(record: DivergenceRecord | None) -> list[tuple[str, str]]:
    """Return what streamed KL and perplexity came to, if they were measured."""
    if record is None:
        return []
    row = record.row()
    source = f"the source's is {row.reference_perplexity.value:.3f}"
    return [
        ("KL, streamed", f"{row.mean_kl.value:.4f} mean, {row.p99_kl:.3f} at 99 %"),
        ("perplexity", f"{row.build_perplexity.value:.3f} on the same tokens, {source}"),
    ]


def comparison_rows(inputs: CardInputs) -> list[tuple[str, str]]:
    """Return each figure beside that of each baseline, with the difference and its error."""
    records = [record for record in (inputs.divergence, inputs.evaluation) if record is not None]
    return [
        (
            f"beside {each.baseline}",
            f"{each.measure} {each.value:.4g}, there {each.baseline_value:.4g}: "
            f"{each.difference:+.3g}"
            + ("" if each.standard_error is None else f" ± {each.standard_error:.2g}"),
        )
        for record in records
        for each in record.comparisons
    ]


def measured_rows(evaluation: EvaluationRecord | None) -> list[tuple[str, str]]:
    """Return each figure of an evaluation, if there was one, with its name."""
    if evaluation is None:
        return []
    measured = evaluation.measurements
    rows: list[tuple[str, str]] = []
    for each in measured.perplexity:
        value = say.with_error(each.value, each.standard_error)
        rows.append(("perplexity", f"{value} on {each.text}"))
    if measured.needle is not None:
        hits = sum(trial.retrieved for trial in measured.needle.trials)
        rows.append(("needle", f"{hits} of {len(measured.needle.trials)} facts found again"))
    for speed in measured.speed:
        rates = f"prefill {speed.prefill_rate:,.1f}, decode {speed.decode_rate:,.1f} tok/s"
        rows.append((f"at {speed.prompt_tokens:,} tokens", rates))
    rows.append(("peak memory", f"{say.size(measured.peak_rss_bytes)} resident while evaluated"))
    rows.append(("measured on", measured.machine.describe()))
    return rows
