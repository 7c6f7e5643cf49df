"""Draws figures in a common style, and saves them as PNG files."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

_INK = "#1f2933"
_WIDTH = 5.8
_SHORT, _LONGEST = 15, 28
"""The maximum length of labels, in characters, in a legend of three columns, and in one of two columns."""
COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#6a3d9a", "#7f4f24")
"""Line colours: the colour-blind-safe palette of Okabe and Ito, and two more."""
_STYLE: Any = {
    "figure.dpi": 200,
    "font.size": 11,
    "legend.fontsize": 9.5,
    "font.family": "DejaVu Sans",
    "text.color": _INK,
    "axes.edgecolor": "#c3cad1",
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9edf0",
    "xtick.color": _INK,
    "ytick.color": _INK,
}


@dataclass(frozen=True)
class Figure:
    """A figure on an HTML page.

    Attributes:
        file: the name of the PNG file, in the folder of the page.
        title: the title of the figure.
        caption: an explanation of what the figure shows and where its data comes from.
    """

    file: str
    title: str
    caption: str


def save(path: Path, height: float, draw: Callable[[Axes], None]) -> None:
    """Calls `draw` with the axes of a new figure of `height` inches, and saves the figure as a PNG file."""
    # pyplot would keep the figure in memory, and would need a display.
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    with rc_context(_STYLE):
        canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
        agg, axes = FigureCanvasAgg(canvas), canvas.add_subplot()
        draw(axes)
        if legend := axes.get_legend():
            # The figure grows by the height of the legend, so that a long legend does not shrink the axes.
            canvas.set_figheight(height + legend.get_window_extent(agg.get_renderer()).height / canvas.dpi)
        agg.print_png(str(path))


def legend_below(axes: Axes) -> None:
    """Draws the legend below the axes. A legend beside the axes would make them too narrow on a phone's screen."""
    handles, labels = axes.get_legend_handles_labels()
    columns = 3 if max(map(len, labels), default=0) <= _SHORT else 2
    names = [wrapped(label) for label in labels]
    axes.legend(handles, names, frameon=False, ncols=columns, loc="upper center", bbox_to_anchor=(0.46, -0.16))


def wrapped(label: str) -> str:
    """Returns a label, such as a recipe's string, broken into lines after its commas."""
    return textwrap.fill(label.replace(",", ", "), _LONGEST).replace(", ", ",")


def plain_numbers(axis: Axis, decades: bool = False) -> None:
    """Labels a logarithmic axis at 1, 2, 5, 10, 20 and so on, or with `decades` only at powers of 10."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0,) if decades else (1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axis.set_minor_formatter(NullFormatter())
