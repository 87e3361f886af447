"""Charts of what a build takes: its recipe, its place on disk, its memory by context."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from glm_quant.quantize.plan import GroupTotals
from glm_quant.report import format as say
from glm_quant.report.charts import Chart, Theme, bare, halo, head
from glm_quant.report.memory import MemoryNeed, machine_bytes, machines


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
        head(figure, theme, "Where the parameters and the bytes are")
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
        bare(top)
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
        bare(bottom)

    parts = (
        f"{say.group_title(g.group)} {say.schemes(g.schemes)}, {say.percent(g.params / params)} of "
        f"parameters and {say.percent(g.size_bytes / total)} of bytes"
        for g in groups
    )
    alt = f"Recipe by component group: {'; '.join(parts)}"
    return Chart("recipe", alt, 2.8 + 0.62 * len(rest), draw)


def footprint_chart(name: str, size_bytes: int, others: Sequence[tuple[str, float]]) -> Chart:
    """Chart the size on disk among other builds, with the memory of machines where it matters.

    Args:
        name: this build.
        size_bytes: its size.
        others: name and size in bytes of other builds.
    """
    rows = sorted([(name, float(size_bytes), True), *((n, s, False) for n, s in others)],
                  key=lambda row: (row[1], not row[2]))  # fmt: skip
    most = rows[-1][1]
    shown = machines().gigabytes if most > machine_bytes(8) else ()
    limit = max(most, *map(machine_bytes, shown)) * 1.05 if shown else most

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        title = "Size on disk, and what machines hold" if shown else "Size on disk"
        head(figure, theme, title)
        for y, (label, value, is_build) in enumerate(rows):
            axes.barh(
                y, value, color=theme.accent if is_build else theme.muted, height=0.38, zorder=2
            )
            weight = "bold" if is_build else "normal"
            axes.text(0, y - 0.24, label, va="bottom", fontsize=11.5, weight=weight, zorder=1.5,
                      bbox=halo(theme))  # fmt: skip
            ink = theme.paper if is_build else theme.ink
            axes.text(value - 0.007 * limit, y, say.size(value), va="center", ha="right",
                      fontsize=10.5, color=ink, zorder=4)  # fmt: skip
        axes.set(xlim=(0, limit), ylim=(len(rows) - 0.65, -1.1 if shown else -0.75))
        _machines(axes, theme, shown, top=-0.85)
        bare(axes)

    fitting = [g for g in shown if machine_bytes(g) > size_bytes]
    least = f"the smallest machine that holds it has {fitting[0]} GB" if fitting else "too large"
    listed = ", ".join(
        f"{label} {say.size(value)}" for label, value, is_build in rows if not is_build
    )
    label_text = say.size(size_bytes) + (f" ({least})" if shown else "")
    alt = f"Size on disk: this build is {label_text}; others: {listed}"
    return Chart("footprint", alt, (1.3 if shown else 0.95) + 0.62 * len(rows), draw)


def memory_chart(needs: Sequence[MemoryNeed]) -> Chart:
    """Chart the peak by context, part by part, and what it leaves of machines' memory."""
    most = needs[-1].total_bytes
    shown = [g for g in machines().gigabytes if machine_bytes(g) < 1.9 * most]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        head(figure, theme, "Memory by context, and what is left")
        height = figure.get_figheight()
        figure.subplots_adjust(bottom=0.6 / height)
        colours = (theme.accent, theme.second, theme.third, theme.fourth)
        for y, need in enumerate(needs):
            offset = 0
            for value, colour in zip(_parts(need), colours, strict=True):
                axes.barh(y, value, left=offset, color=colour, height=0.4, zorder=2)
                offset += value
            label = f"{say.tokens(need.context)} tokens: {say.size(offset)}"
            if shown:
                label += f" · {_left(need)}"
            axes.text(0, y - 0.26, label, va="bottom", fontsize=11.5, zorder=1.5, bbox=halo(theme))
        axes.set(xlim=(0, limit), ylim=(len(needs) - 0.6, -1.1 if shown else -0.75))
        _machines(axes, theme, shown, top=-0.85)
        names = ("weights", "MLA cache", "indexer cache", "reading the prompt")
        for x, name, colour in zip((0.0, 0.17, 0.38, 0.65), names, colours, strict=True):
            axes.text(x, -0.02, f"■ {name}", color=colour, fontsize=11, transform=axes.transAxes,
                      va="top")  # fmt: skip
        bare(axes)

    limit = max([most, *(machine_bytes(g) for g in shown)]) * 1.05
    listed = ", ".join(_need(need, bool(shown)) for need in needs)
    alt = f"Peak memory with weights of {say.size(needs[0].weight_bytes)}, by context: {listed}"
    return Chart("memory", alt, 1.6 + (0.35 if shown else 0.0) + 0.66 * len(needs), draw)


def _parts(need: MemoryNeed) -> tuple[int, int, int, int]:
    return need.weight_bytes, need.latent_bytes, need.indexer_bytes, need.prefill_bytes


def _left(need: MemoryNeed) -> str:
    """Return what the smallest machine that holds it has left."""
    for gigabytes in machines().gigabytes:
        free = machine_bytes(gigabytes) - need.total_bytes
        if free > 0:
            return f"{say.size(free)} left of {gigabytes} GB"
    return f"more than {machines().gigabytes[-1]} GB"


def _need(need: MemoryNeed, on_machines: bool) -> str:
    """Return a need in words, with what is left of a machine where machines matter."""
    narrow = need.total_8bit_bytes
    more = [_left(need)] if on_machines else []
    more += [] if narrow is None else [f"with 8-bit caches {say.size(narrow)}"]
    whole = f"{say.tokens(need.context)} tokens: {say.size(need.total_bytes)}"
    return f"{whole} ({', '.join(more)})" if more else whole


def _machines(axes: Axes, theme: Theme, gigabytes: Sequence[int], top: float) -> None:
    """Draw the memory of machines as vertical lines, named above the bars."""
    for each in gigabytes:
        x = machine_bytes(each)
        bottom = axes.get_ylim()[0]
        axes.plot([x, x], [top, bottom], color=theme.faint, linewidth=1.2, linestyle=(0, (4, 3)),
                  zorder=1)  # fmt: skip
        axes.text(x, top, f"{each} GB", ha="center", va="bottom", fontsize=11, color=theme.faint,
                  weight="bold", bbox=halo(theme))  # fmt: skip
