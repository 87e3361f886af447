"""What a person looks at before trusting a build: tables, the card and links, from records alone.

Plain rows and Markdown, for whoever shows them.
"""

import base64
import re
from pathlib import Path

from glm_quant.build import Build
from glm_quant.evaluation.divergence_record import DivergenceRecord
from glm_quant.evaluation.records import EvaluationRecord
from glm_quant.parity.check import ParityRecord
from glm_quant.report import benchmarks
from glm_quant.report import format as say
from glm_quant.report.correctness import parity_rows, parity_value
from glm_quant.stages.plan import PlanFigures

Rows = list[dict[str, str]]

# `![alt](assets/chart.png#hf-light-mode-only)` and its dark twin, as the card has them.
_IMAGE = re.compile(r"!\[((?:\\.|[^\]])*)\]\((assets/[\w.-]+\.png)#hf-(light|dark)-mode-only\)\n?")
_FRONT_MATTER = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)


def group_rows(plan: PlanFigures) -> Rows:
    """Return a row for each component group of a plan, and the total."""
    rows = [
        {
            "component": say.group_title(group.group),
            "parameters": say.count(group.params),
            "scheme": say.schemes(group.schemes),
            "bytes": say.size(group.size_bytes),
            "share of bytes": say.percent(group.size_bytes / plan.tensor_bytes),
        }
        for group in plan.groups
    ]
    total = {
        "component": "total",
        "parameters": say.count(plan.params),
        "scheme": f"{plan.bits_per_weight:.3f} bits per weight",
        "bytes": say.size(plan.tensor_bytes),
        "share of bytes": say.percent(1.0),
    }
    return [*rows, total]


def shard_rows(build: Build) -> Rows:
    """Return a row for each output shard: what it is, and whether it is finished."""
    rows: Rows = []
    for number, shard in enumerate(build.plan.shards):
        record = build.conversion.outputs.finished(number)
        rows.append(
            {
                "file": shard.name,
                "bytes": say.size(shard.size_bytes),
                "tensors": f"{len(shard.tensors):,}",
                "state": "finished" if record else "to do",
                "sha256": record.outputs[0].sha256[:16] if record else "",
            }
        )
    return rows


def comparison_rows(record: ParityRecord) -> Rows:
    """Return a row for each comparison with the reference: what came out, what was allowed."""
    return [
        {
            "compared": row.measure,
            "measured": parity_value(row),
            "bound": "" if row.bound is None else f"{'≥' if row.at_least else '≤'} {row.bound:g}",
            "how": row.how,
        }
        for row in parity_rows(record)
    ]


def divergence_table(record: DivergenceRecord) -> Rows:
    """Return a row for each slice of the comparison with the source, and each bucket of it."""
    return [
        {
            "text": row.slice,
            "at positions": say.bucket(row.bucket, record.index_topk),
            "compared": f"{row.positions:,}",
            "KL, mean": say.with_error(row.mean_kl.value, row.mean_kl.standard_error, 4),
            "KL, 99 %": f"{row.p99_kl:.3f}",
            "same top token": say.percent(row.top1_agreement.value),
            "perplexity": f"{row.build_perplexity.value:.3f}",
            "the source's": f"{row.reference_perplexity.value:.3f}",
        }
        for row in record.rows
    ]


def evaluation_rows(record: EvaluationRecord) -> Rows:
    """Return a row for each figure of an evaluation, with the baselines' beside it."""
    names = [baseline.name for baseline in record.baselines]
    rows: Rows = []
    for row in benchmarks.rows(record, ()):
        cells = dict(zip(["this build", *names], [row.cells[-1], *row.cells[:-1]], strict=True))
        rows.append({"measured": row.name} | cells | {"how": row.how})
    rows.append(_memory_row(record))
    return rows


def _memory_row(record: EvaluationRecord) -> dict[str, str]:
    own = record.measurements
    measured = {"this build": own} | {each.name: each.measurements for each in record.baselines}
    cells = {
        name: say.size(of.peak_rss_bytes) if of.machine == own.machine else benchmarks.NOTHING
        for name, of in measured.items()
    }
    return {"measured": "Resident memory, at most"} | cells | {"how": own.machine.describe()}


def card_markdown(folder: Path) -> str:
    """Return a build's card with its charts inside, to be shown where its files are not."""
    text = _FRONT_MATTER.sub("", (folder / "README.md").read_text(encoding="utf-8"))
    return _IMAGE.sub(lambda found: _inlined(folder, found), text)


def web_page(uri: str) -> str | None:
    """Return the page of a place on the Hub, at its revision; None for other places."""
    found = re.fullmatch(r"hf://([\w.-]+/[\w.-]+)(?:@(.+))?", uri)
    if found is None:
        return None
    repo, revision = found.groups()
    return f"https://huggingface.co/{repo}/tree/{revision or 'main'}"


def _inlined(folder: Path, found: re.Match[str]) -> str:
    if found[3] == "dark":  # only the Hub shows one of the two
        return ""
    data = base64.b64encode((folder / found[2]).read_bytes()).decode()
    return f"![{found[1]}](data:image/png;base64,{data})\n"
