"""Canvas of the figures: style, axes and rendering (the only file that uses matplotlib).

Everything goes through `Figure` objects: no pyplot, no display, no global state that outlives a call. Ordered
things (ranks) take their colour from viridis, unordered ones (families) from Okabe and Ito's palette; both
survive the common kinds of colour blindness and grey print.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorax_kit.extras import need

need("report", "matplotlib")

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from lorax_kit.files.staging import replace_file

OKABE_ITO = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#5b5b5b", "#000000")
MARKERS = "osD^vPXh"
INK, QUIET, FAINT = "#222222", "#6b6b6b", "#e6e6e3"
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.titlecolor": INK,
    "axes.edgecolor": QUIET,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "xtick.color": QUIET,
    "ytick.color": QUIET,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "text.parse_math": False,  # a $ in a name is a $
    "svg.hashsalt": "lorax_kit",  # the same run gives the same file
    "svg.fonttype": "path",
    "pdf.fonttype": 42,  # TrueType, which journals accept; the default, Type 3, they often do not
}

if TYPE_CHECKING:
    from jaxtyping import Float


KINDS = ("png", "svg", "pdf")


@dataclass(frozen=True)
class Plot:
    """One figure: file stem, caption (plain text), and its renderings."""

    name: str
    caption: str
    svg: str
    png: bytes
    pdf: bytes

    def write(self, folder: Path) -> None:
        """Write its files, `<name>.png`, `.svg` and `.pdf`, each replaced atomically."""
        for kind, content in (("png", self.png), ("svg", self.svg.encode()), ("pdf", self.pdf)):
            replace_file(folder / f"{self.name}.{kind}", content)


def render(name: str, make: Callable[[], tuple[Figure, str] | str]) -> Plot | str:
    """Run `make` in the house style and render what it drew; a string (why not) is passed through."""
    with matplotlib.rc_context(STYLE):
        made = make()
        if isinstance(made, str):
            return made
        figure, caption = made
        svg, png, pdf = io.StringIO(), io.BytesIO(), io.BytesIO()
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
        figure.savefig(pdf, format="pdf", metadata={"CreationDate": None, "Creator": None, "Producer": None})
    return Plot(name, caption, svg.getvalue(), png.getvalue(), pdf.getvalue())


def canvas(height: float) -> Figure:
    """An empty figure of page width; `height` in inches."""
    return Figure(figsize=(7.2, height), layout="constrained")


def family_style(index: int) -> tuple[str, str]:
    """Colour and marker of the index-th family."""
    return OKABE_ITO[index % len(OKABE_ITO)], MARKERS[index % len(MARKERS)]


def rank_colour(rank: int, ranks: Sequence[int]) -> Any:
    """Colour of a rank: light for small, dark for large; grey for the probe (0)."""
    if rank == 0:
        return QUIET
    lightness = 1 - ranks.index(rank) / (len(ranks) - 1) if len(ranks) > 1 else 0.4
    return matplotlib.colormaps["viridis"](0.88 * lightness)


def heat_map(axes: Axes, values: Float[np.ndarray, "rows columns"], limits: tuple[float, float]) -> AxesImage:
    """Draw a matrix as colours; nan stays white."""
    axes.grid(False)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    low, high = limits
    return axes.imshow(values, cmap="viridis", vmin=low, vmax=high, aspect="auto", interpolation="nearest")


def write_cells(
    axes: Axes,
    values: Float[np.ndarray, "rows columns"],
    limits: tuple[float, float],
    text: Callable[[int, int], str],
    size: float = 8,
) -> None:
    """Write `text(row, column)` into each cell of a heat map, in ink that shows on its colour."""
    low, high = limits
    for row, column in np.ndindex(*values.shape):
        value = values[row, column]
        dark = not math.isnan(value) and (value - low) / (high - low) < 0.6
        style: dict[str, Any] = {"color": "white" if dark else INK, "fontsize": size}
        axes.text(column, row, text(row, column), ha="center", va="center", **style)


def frame_cell(axes: Axes, row: int, column: int) -> None:
    """Put a frame around one cell of a heat map."""
    corner = (column - 0.46, row - 0.46)
    axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor="#D55E00", linewidth=1.8))


def colour_bar(figure: Figure, image: AxesImage, axes: Sequence[Axes], label: str) -> None:
    """Add the colour scale of a heat map to the right of `axes`."""
    bar = figure.colorbar(image, ax=list(axes), label=label, pad=0.02, aspect=30)
    bar.outline.set_visible(False)  # type: ignore[operator]


def rank_axis(axes: Axes, ranks: Sequence[int], pad: float = 0.45) -> None:
    """Ranks at equal distances along x."""
    axes.set_xticks(range(len(ranks)), [str(rank) for rank in ranks])
    axes.set_xlim(-pad, len(ranks) - 1 + pad)
    axes.set_xlabel("rank")


def log_axis(axes: Axes, which: str, values: Sequence[float], text: Callable[[float], str], most: int = 7) -> None:
    """A log axis ("x" or "y") with ticks at (at most `most` of) the values themselves, written by `text`."""
    axis = axes.xaxis if which == "x" else axes.yaxis
    known = sorted({value for value in values if value > 0})
    axes.set(**{f"{which}scale": "log", f"{which}lim": (known[0] / 1.6, known[-1] * 1.6)})
    ticks: list[float] = []
    for value in known:  # labels closer than a factor of 1.4 would overlap
        if not ticks or value > 1.4 * ticks[-1]:
            ticks.append(value)
    step = math.ceil(len(ticks) / most)
    axis.set_ticks(ticks[::step])
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def value_axis(axes: Axes, values: Sequence[float], text: Callable[[float], str]) -> None:
    """An x axis from zero to above the largest value, its ticks written by `text`."""
    axes.set_xlim(0, 1.12 * max(values))
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: text(value)))


def log_values(axes: Axes) -> None:
    """A log y axis with plain numbers at powers of ten, and at 2 and 5 times them where there are few."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def whole_numbers(axes: Axes, most: int) -> None:
    """Integer ticks along x, at most about `most` of them."""
    axes.xaxis.set_major_locator(MaxNLocator(most, integer=True))


def numbered(axes: Axes, last: int) -> None:
    """Ticks at 1 to `last` along x, the first always among them, at most about eight."""
    axes.set_xlim(0.5, last + 0.5)
    axes.set_xticks(range(1, last + 1, max(1, math.ceil((last - 1) / 7))))


def legend_below(figure: Figure, axes: Axes, columns: int = 4) -> None:
    """The legend of `axes`, under the whole figure; none if nothing is labelled."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=min(columns, len(labels)))
