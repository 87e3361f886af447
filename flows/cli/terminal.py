"""What a person sees in the terminal: results as tables, errors in short."""

import json
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from typing import Any

import typer
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from flows.cli.log_lines import warnings_shown
from glm_quant.artifact import disk_errors_named
from glm_quant.errors import GlmQuantError
from glm_quant.fit.record import FitResult
from glm_quant.status import WorkspaceStatus

OUT = Console(soft_wrap=True)
ERRORS = Console(stderr=True, soft_wrap=True)


def print_json(value: Any) -> None:
    """Write the one JSON value of `--json`."""
    sys.stdout.write(json.dumps(value, indent=2) + "\n")


@contextmanager
def errors_in_one_screen(verbose: bool = False) -> Generator[None]:
    """Turn our errors into a message and an exit code, and show warnings as they come.

    With `verbose` the log itself is shown, warnings and all.
    """
    try:
        with nullcontext() if verbose else warnings_shown(ERRORS), disk_errors_named():
            yield
    except GlmQuantError as error:
        if verbose:
            ERRORS.print_exception()
        ERRORS.print(f"[bold red]{type(error).__name__}[/] ", end="")
        ERRORS.print(str(error), markup=False, highlight=False)
        raise typer.Exit(error.exit_code) from None


def fit_table(result: FitResult) -> RenderableType:
    """Return the front of a fit, the chosen point marked, and what each part got.

    What is larger than that point is beyond the target.
    """
    front = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for title in ("tensors, bytes", "bits per weight", "cost", ""):
        front.add_column(title, justify="right")
    for point in result.front:
        beyond = "dim" if point.tensor_bytes > result.tensor_bytes else None
        style = "bold green" if point.chosen else beyond
        mark = "chosen" if point.chosen else "too large" if beyond else ""
        numbers = f"{point.tensor_bytes:,}", f"{point.bits_per_weight:.3f}", f"{point.cost:.5g}"
        front.add_row(*numbers, mark, style=style)
    parts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for part, scheme in result.choices:
        parts.add_row(part, scheme)
    return Group(
        Text(f"{result.output}: {result.budget}", style="bold"),
        Text(f"cost: {result.cost_of}", style="dim"),
        front,
        parts,
    )


def status_table(status: WorkspaceStatus) -> RenderableType:
    """Return a workspace's state: a line a stage, then what runs or failed."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for stage in status.stages:
        whole = stage.done >= stage.total
        mark = "[green]done[/]" if whole else f"{stage.done} of {stage.total}"
        table.add_row(stage.stage, mark if stage.done else "[dim]to do[/]")
    size = f"{status.done_bytes / 1e9:,.3f} of {status.total_bytes / 1e9:,.3f} GB of weights made"
    lines = [Text(f"{status.recipe} in {status.workspace}: {size}", style="bold"), table]
    if status.unchecked:
        note = f"by the records alone, not compared with recipe and source: {status.unchecked}"
        lines.append(Text(note, style="dim"))
    if status.running:
        lines.append(Text(f"process {status.running} is working here", style="green"))
    if status.failure:
        failure = status.failure
        lines.append(Text(f"{failure.stage} failed: {failure.error}: {failure.message}", "red"))
    return Group(*lines)
