"""Charts of what a build can do: its distance from the source, what it finds, what bits buy."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from glm_quant.evaluation.divergence_record import DivergenceRow
from glm_quant.evaluation.records import Needle
from glm_quant.report.charts import Chart, Theme, bare, halo, head


def divergence_chart(rows: Sequence[DivergenceRow]) -> Chart:
    """Chart mean and 99 % KL of each slice.

    Args:
        rows: of the record; one a slice is shown, over all positions.
    """
    shown = [row for row in rows if row.bucket == "all"]

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        head(figure, theme, "KL divergence to the bf16 source")
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
        bare(axes)
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
        head(figure, theme, "Distance from the source, layer by layer")
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


def needle_chart(needle: Needle) -> Chart:
    """Chart the share of facts retrieved by prompt length and depth."""
    grid = needle.grid()
    lengths, depths = list(grid), sorted({depth for row in grid.values() for depth in row})

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        head(figure, theme, "Facts found again, by prompt length and place")
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


@dataclass(frozen=True)
class Point:
    """One build: what it takes, how far it falls short (less is better), and both in words."""

    name: str
    cost: float
    loss: float
    said: str


def bits_chart(title: str, labels: tuple[str, str], build: Point, others: Sequence[Point]) -> Chart:
    """Chart what bits buy: a loss against what a build takes.

    Args:
        title: of the chart.
        labels: what `cost` and `loss` are.
        build: this build.
        others: baselines that were measured on the same tokens.
    """
    points = sorted([build, *others], key=lambda point: point.cost)

    def draw(figure: Figure, theme: Theme) -> None:
        axes = figure.subplots()
        head(figure, theme, title)
        height = figure.get_figheight()
        figure.subplots_adjust(left=0.15, bottom=0.8 / height, top=1 - 0.7 / height)
        x = [point.cost for point in points]
        y = [point.loss for point in points]
        axes.plot(x, y, color=theme.muted, linewidth=1.5, zorder=1)
        middle = (x[0] + x[-1]) / 2
        for number, point in enumerate(points):
            is_build = point is build
            colour = theme.accent if is_build else theme.second
            axes.scatter(point.cost, point.loss, s=90, color=colour, zorder=2)
            is_left = point.cost <= middle
            # Its words go inwards, on the side of the line to the neighbour that is free.
            beside = y[min(number + 1, len(y) - 1) if is_left else max(number - 1, 0)]
            below = beside > point.loss
            axes.annotate(
                f"{point.name}\n{point.said}",
                (point.cost, point.loss), (10 if is_left else -10, -8 if below else 8),
                textcoords="offset points", ha="left" if is_left else "right", fontsize=11.5,
                va="top" if below else "bottom",
                color=colour, weight="bold" if is_build else "normal", bbox=halo(theme), zorder=3,
            )  # fmt: skip
        axes.set(facecolor="none", xlabel=labels[0], ylabel=labels[1])
        axes.set_ylim(0, max(y) * 1.35)
        axes.margins(x=0.12)
        axes.grid(axis="y", color=theme.line, linewidth=0.8)
        axes.tick_params(length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)

    listed = ", ".join(f"{point.name} {point.said}" for point in points)
    return Chart("bits", f"{title}: {listed}", 4.4, draw)
