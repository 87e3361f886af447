"""What the charts share: themes, files, titles. Only the modules of charts use matplotlib.

Cards are read on phones, where 1,400 pixels shrink to 360, so type
is 13 points on a figure 7 inches wide. Files are the same bytes for the same data.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

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
    fourth: str
    muted: str


LIGHT = Theme(
    "",
    "#ffffff",
    "#1f2328",
    "#59636e",
    "#d1d9e0",
    "#0969da",
    "#e36209",
    "#8250df",
    "#1a7f37",
    "#afb8c1",
)
DARK = Theme(
    "-dark",
    "#0d1117",
    "#f0f6fc",
    "#9198a1",
    "#3d444d",
    "#4493f8",
    "#f0883e",
    "#ab7df8",
    "#3fb950",
    "#59636e",
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


def head(figure: Figure, theme: Theme, title: str) -> None:
    """Write a figure's title and give its content the room below it, in inches."""
    height = figure.get_figheight()
    figure.text(
        0.04, 1 - 0.16 / height, title, fontsize=15, weight="bold", va="top", color=theme.ink
    )
    figure.subplots_adjust(left=0.04, right=0.96, top=1 - 0.6 / height, bottom=0.3 / height)


def bare(axes: Axes) -> None:
    """Take ticks and frame away: the bars are labelled."""
    axes.set(xticks=[], yticks=[], facecolor="none")
    axes.spines[:].set_visible(False)


def halo(theme: Theme) -> dict[str, Any]:
    """Return a box that keeps a label readable where a line crosses it."""
    return {"facecolor": theme.paper, "edgecolor": "none", "pad": 1.5}
