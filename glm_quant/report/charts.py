"""Charts of a build, light and dark: the only user of matplotlib.

What a reader would get wrong: cards are read on phones, where 1,400 pixels shrink to 360, so type
is 13 points on a figure 7 inches wide. Files are the same bytes for the same data.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from glm_quant.evaluation.divergence_record import DivergenceRow
from glm_quant.evaluation.records import Needle
from glm_quant.quantize.plan import GroupTotals
from glm_quant.report import format as say
from glm_quant.report.memory import MACHINES_GB, MemoryNeed, machine_bytes

_WIDTH = 7.0
_DPI = 200


@dataclass(frozen=True)
class Theme:
    """Colours of one appearance."""

    suffix: str
    paper: str
    ink: str
    faint: str
    line: str
    accent: str
    second: str
    third: str
    muted: str


LIGHT = Theme(
    "", "#ffffff", "#1f2328", "#59636e", "#d1d9e0", "#0969da", "#e36209", "#8250df", "#afb8c1"
)
DARK = Theme(
    "-dark", "#0d1117", "#f0f6fc", "#9198a1", "#3d444d", "#4493f8", "#f0883e", "#ab7df8", "#59636e"
)


@dataclass(frozen=True)
class Chart:
    """A chart that can be drawn in a theme; `alt` says in words what it shows."""

    name: str
    alt: str
    height: float
    draw: Callable[[Figure, Theme], None]

    def file(self, theme: Theme) -> str:
        """Return the file's name."""
        return f"{self.name}{theme.suffix}.png"


def render(chart: Chart, theme: Theme, folder: Path) -> Path:
    """Draw a chart into `folder`; returns the file."""
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",
        "font.size": 13,
        "text.color": theme.ink,
        "axes.labelcolor": theme.faint,
        "xtick.color": theme.faint,
        "ytick.color": theme.ink,
        "axes.edgecolor": theme.line,
    }
    with rc_context(style):
        figure = Figure(figsize=(_WIDTH, chart.height), dpi=_DPI, facecolor=theme.paper)
        canvas = FigureCanvasAgg(figure)
        chart.draw(figure, theme)
        path = folder / chart.file(theme)
        folder.mkdir(parents=True, exist_ok=True)
        # Without the software's name the bytes depend on the data alone.
        canvas.print_png(str(path), metadata={"Software": None})
    return path


def recipe_chart(groups: Sequence[GroupTotals]) -> Chart:
    """Chart the recipe: where parameters and bytes are, group by group.

    The group with most parameters is set against the rest, and the rest is shown enlarged.

    Args:
        groups: totals of each component group.
    """
    params, total = sum(g.params for g in groups), sum(g.size_bytes for g in groups)
    first = max(groups, key=lambda group: group.params)
    rest = sorted((g for g in groups if g is not first), key=lambda group: -group.size_bytes)
    title = say.group_title(first.group)

    def draw(figure: Figure, theme: Theme) -> None:
        top, bottom = figure.subplots(
            2, 1, gridspec_kw={"height_ratios": [1.5, 0.62 * len(rest) + 0.2], "hspace": 0.2}
        )
        _head(figure, theme, "Where the parameters and the bytes are")
        shares = (
            ("Parameters", first.params / params, say.count(params)),
            ("Bytes", first.size_bytes / total, say.size(total)),
        )
        for row, (name, share, whole) in enumerate(shares):
            top.barh(row, share, color=theme.accent, height=0.5)
            top.barh(row, 1 - share, left=share, color=theme.second, height=0.5)
            top.text(0.015, row, say.percent(share), va="center", color=theme.paper, fontsize=11.5,
                     weight="bold")  # fmt: skip
            top.text(0, row - 0.29, f"{name}: {whole}", va="bottom", fontsize=12)
        top.set(xlim=(0, 1), ylim=(1.3, -1.15))
        top.text(0, -0.75, f"{title} · {say.schemes(first.schemes)}", va="bottom", fontsize=12,
                 color=theme.accent, weight="bold")  # fmt: skip
        _bare(top)
        most = max((g.size_bytes for g in rest), default=1)
        for row, group in enumerate(rest):
            bottom.barh(row, group.size_bytes / most, color=theme.second, height=0.4)
            name = f"{say.group_title(group.group)} · {say.schemes(group.schemes)}"
            bottom.text(0, row - 0.25, name, va="bottom", fontsize=12)
            value = f"{say.size(group.size_bytes)} · {say.count(group.params)} params"
            bottom.text(
                1, row - 0.25, value, va="bottom", ha="right", color=theme.faint, fontsize=11
            )
        others, other_params = 1 - first.size_bytes / total, 1 - first.params / params
        bottom.set_title(
            f"The rest: {say.percent(other_params)} of parameters, {say.percent(others)} of bytes",
            loc="left", fontsize=12, color=theme.second, weight="bold",
        )  # fmt: skip
        bottom.set(xlim=(0, 1), ylim=(len(rest) - 0.7, -0.75))
        _bare(bottom)

    parts = (
        f"{say.group_title(g.group)} {say.schemes(g.schemes)}, {say.percent(g.params / params)} of "
        f"parameters and {say.percent(g.size_bytes / total)} of bytes"
        for g in groups
    )
    alt = f"Recipe by component group: {'; '.join(parts)}"
    return Chart("recipe", alt, 2.8 + 0.62 * len(rest), draw)


def footprint_chart(name: str, size_bytes: int, others: Sequence[tuple[str, float]]) -> Chart:
    """Chart the size on disk among other builds, with the memory of machines.

    Args:
        name: this build.
        size_bytes: its size.
        others: name and size in bytes of other builds.
    """
    rows = sorted([(name, float(size_bytes), True), *((n, s, False) for n, s in others)],
                  key=lambda row: (row[1], not row[2]))  # fmt: skip

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        _head(figure, theme, "Size on disk, and what machines hold")
        for y, (label, value, ours) in enumerate(rows):
            axes.barh(y, value, color=theme.accent if ours else theme.muted, height=0.38, zorder=2)
            weight = "bold" if ours else "normal"
            axes.text(0, y - 0.24, label, va="bottom", fontsize=11.5, weight=weight, zorder=1.5,
                      bbox=_halo(theme))  # fmt: skip
            axes.text(value - 4e9, y, say.size(value), va="center", ha="right", fontsize=10.5,
                      color=theme.paper if ours else theme.ink, zorder=4)  # fmt: skip
        limit = max(machine_bytes(MACHINES_GB[-1]), rows[-1][1]) * 1.05
        axes.set(xlim=(0, limit), ylim=(len(rows) - 0.65, -1.1))
        _machines(axes, theme, MACHINES_GB, top=-0.85)
        _bare(axes)

    fitting = [g for g in MACHINES_GB if machine_bytes(g) > size_bytes]
    least = f"the smallest machine that holds it has {fitting[0]} GB" if fitting else "too large"
    listed = ", ".join(f"{label} {say.size(value)}" for label, value, ours in rows if not ours)
    alt = f"Size on disk: this build is {say.size(size_bytes)} ({least}); others: {listed}"
    return Chart("footprint", alt, 1.3 + 0.62 * len(rows), draw)


def memory_chart(needs: Sequence[MemoryNeed]) -> Chart:
    """Chart weights and caches by context, with the memory of machines."""
    most = needs[-1].total_bytes
    shown = [g for g in MACHINES_GB if machine_bytes(g) < 1.9 * most]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        _head(figure, theme, "Memory by context")
        colours = (theme.accent, theme.second, theme.third)
        for y, need in enumerate(needs):
            left = 0
            parts = (need.weight_bytes, need.latent_bytes, need.indexer_bytes)
            for value, colour in zip(parts, colours, strict=True):
                axes.barh(y, value, left=left, color=colour, height=0.4, zorder=2)
                left += value
            label = _need(need)
            axes.text(0, y - 0.26, label, va="bottom", fontsize=11.5, zorder=1.5, bbox=_halo(theme))
        limit = max([most, *(machine_bytes(g) for g in shown)]) * 1.05
        axes.set(xlim=(0, limit), ylim=(len(needs) - 0.6, -1.1 if shown else -0.75))
        _machines(axes, theme, shown, top=-0.85)
        names = ("weights", "MLA cache, 16-bit", "indexer cache, 16-bit")
        for x, name, colour in zip((0.0, 0.2, 0.56), names, colours, strict=True):
            axes.text(x, -0.02, f"■ {name}", color=colour, fontsize=11, transform=axes.transAxes,
                      va="top")  # fmt: skip
        _bare(axes)

    listed = ", ".join(_need(need) for need in needs)
    alt = f"Weights of {say.size(needs[0].weight_bytes)} and caches by context: {listed}"
    return Chart("memory", alt, 1.3 + (0.35 if shown else 0.0) + 0.66 * len(needs), draw)


def needle_chart(needle: Needle) -> Chart:
    """Chart the share of facts retrieved by prompt length and depth."""
    grid = needle.grid()
    lengths, depths = list(grid), sorted({depth for row in grid.values() for depth in row})

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        _head(figure, theme, "Facts found again, by prompt length and place")
        figure.subplots_adjust(left=0.17, bottom=0.75 / figure.get_figheight())
        values = [[grid[length].get(depth, 0.0) for length in lengths] for depth in depths]
        shades = LinearSegmentedColormap.from_list(
            "share", [theme.second, theme.paper, theme.accent]
        )
        axes.imshow(values, cmap=shades, vmin=0, vmax=1, aspect="auto")
        for y, row in enumerate(values):
            for x, value in enumerate(row):
                pale = 0.1 < value < 0.9
                axes.text(x, y, f"{value:.0%}", ha="center", va="center", weight="bold",
                          color=theme.ink if pale else theme.paper)  # fmt: skip
        axes.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
        axes.set_xlabel("prompt length in tokens")
        axes.set_ylabel("place in the prompt")
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)

    rows = ", ".join(f"{n:,} tokens {sum(row.values()) / len(row):.0%}" for n, row in grid.items())
    alt = f"Needle retrieval by prompt length, mean over depths: {rows}"
    return Chart("needle", alt, 1.7 + 0.5 * len(depths), draw)


def divergence_chart(rows: Sequence[DivergenceRow]) -> Chart:
    """Chart mean and 99 % KL of each slice.

    Args:
        rows: of the record; one a slice is shown, over all positions.
    """
    shown = [row for row in rows if row.bucket == "all"]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        _head(figure, theme, "KL divergence to the bf16 source")
        most = max(row.p99_kl for row in shown) or 1.0
        for y, row in enumerate(shown):
            axes.barh(y, row.p99_kl, color=theme.muted, height=0.4)
            axes.barh(y, row.mean_kl.value, color=theme.accent, height=0.4)
            name = "all texts" if row.slice == "all" else row.slice
            weight = "bold" if row.slice == "all" else "normal"
            axes.text(0, y - 0.26, name, va="bottom", fontsize=12, weight=weight)
            value = f"mean {row.mean_kl.value:.3f} · 99 % {row.p99_kl:.2f}"
            axes.text(
                most, y - 0.26, value, va="bottom", ha="right", fontsize=11, color=theme.faint
            )
        axes.set(xlim=(0, most), ylim=(len(shown) - 0.55, -0.8))
        _bare(axes)
        legend = ((0.0, "mean", theme.accent), (0.16, "99 % of positions are below", theme.faint))
        for x, name, colour in legend:
            axes.text(x, -0.01, f"■ {name}", color=colour, fontsize=11, transform=axes.transAxes,
                      va="top")  # fmt: skip

    listed = ", ".join(
        f"{row.slice} {row.mean_kl.value:.4f} (99 % {row.p99_kl:.3f})" for row in shown
    )
    return Chart("divergence", f"Mean KL divergence to the source in nats: {listed}",
                 1.15 + 0.66 * len(shown), draw)  # fmt: skip


def layers_chart(errors: Sequence[float]) -> Chart:
    """Chart how the build's error grows from layer to layer.

    Args:
        errors: norm of the difference to the source's hidden states, relative to their norm.
    """

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        _head(figure, theme, "Distance from the source, layer by layer")
        height = figure.get_figheight()
        figure.subplots_adjust(left=0.15, bottom=0.8 / height, top=1 - 0.7 / height)
        layers = range(len(errors))
        marker = "o" if len(errors) < 20 else ""
        axes.plot(layers, errors, color=theme.accent, linewidth=2.5, marker=marker)
        axes.fill_between(layers, errors, color=theme.accent, alpha=0.15, linewidth=0)
        last = (len(errors) - 1, errors[-1])
        axes.annotate(f"{errors[-1]:.3f}", last, (-4, 8), textcoords="offset points", ha="right",
                      weight="bold", color=theme.accent)  # fmt: skip
        axes.set(facecolor="none", xlabel="layer", ylabel="relative error", ylim=(0, None))
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", color=theme.line, linewidth=0.8)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)

    worst = max(range(len(errors)), key=lambda layer: errors[layer])
    alt = (
        f"Relative error of the hidden states by layer: {errors[0]:.3f} after layer 0, "
        f"{errors[-1]:.3f} after layer {len(errors) - 1}, largest {errors[worst]:.3f} after layer "
        f"{worst}"
    )
    return Chart("layers", alt, 3.8, draw)


def _head(figure: Figure, theme: Theme, title: str) -> None:
    """Write a figure's title and give its content the room below it, in inches."""
    height = figure.get_figheight()
    figure.text(
        0.04, 1 - 0.16 / height, title, fontsize=15, weight="bold", va="top", color=theme.ink
    )
    figure.subplots_adjust(left=0.04, right=0.96, top=1 - 0.6 / height, bottom=0.3 / height)


def _need(need: MemoryNeed) -> str:
    narrow = need.total_8bit_bytes
    other = "" if narrow is None else f" (8-bit cache {say.size(narrow)})"
    return f"{say.tokens(need.context)} tokens: {say.size(need.total_bytes)}{other}"


def _bare(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[], facecolor="none")
    axes.spines[:].set_visible(False)


def _halo(theme: Theme) -> dict[str, Any]:
    """Return a box that keeps a label readable where a line crosses it."""
    return {"facecolor": theme.paper, "edgecolor": "none", "pad": 1.5}


def _machines(axes: Axes, theme: Theme, gigabytes: Sequence[int], top: float) -> None:
    """Draw the memory of machines as vertical lines, named above the bars."""
    for each in gigabytes:
        x = machine_bytes(each)
        bottom = axes.get_ylim()[0]
        axes.plot([x, x], [top, bottom], color=theme.faint, linewidth=1.2, linestyle=(0, (4, 3)),
                  zorder=1)  # fmt: skip
        axes.text(x, top, f"{each} GB", ha="center", va="bottom", fontsize=11, color=theme.faint,
                  weight="bold", bbox=_halo(theme))  # fmt: skip
