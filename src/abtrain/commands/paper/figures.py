"""Draws the paper's figures from the results of runs, with error bars and the paper's values for its own models."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from abtrain.commands.figures import COLOURS, Figure, legend_below, save
from abtrain.commands.paper.arithmetic import ecr_rows
from abtrain.commands.paper.experiments import METHODS, Cell, Scaling
from abtrain.commands.paper.published import DDP, TABLE2, PaperCell, Value
from abtrain.commands.paper.tables import PaperRow

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_HEIGHT = 4.4
_GREY = "#616e7c"


@dataclass(frozen=True)
class _Panel:
    """One plot: a quantity over the number of nodes or over the global batch.

    Attributes:
        name: the name of its file.
        title: the title of the figure.
        axis: the name of the vertical axis.
        value: a function that returns the quantity of a row.
        paper: a function that returns the quantity of a cell of the paper's table, or None if the paper does not give
            it.
        scaling: the batch that is constant in the runs that the plot shows, local or global.
        over: the quantity of the horizontal axis.
        log: whether the vertical axis is logarithmic.
    """

    name: str
    title: str
    axis: str
    value: Callable[[PaperRow], Value]
    paper: Callable[[PaperCell], Value | None]
    scaling: Scaling
    over: Literal["batch", "nodes"]
    log: bool = False


def _ratio(cell: PaperCell) -> Value | None:
    return None if cell.compression is None else Value(cell.compression, 0.0)


def _minutes(row: PaperRow) -> Value:
    return Value(row.seconds.mean / 60, row.seconds.std / 60)


_TOP1 = "top-1 in %"
PANELS: dict[str, tuple[_Panel, ...]] = {
    "fig2": (
        _Panel("fig2", "Accuracy, constant local batch", _TOP1, lambda r: r.top1, lambda c: c.top1, "local", "batch"),
    ),
    "fig3": (
        _Panel("fig3", "Accuracy, constant global batch", _TOP1, lambda r: r.top1, lambda c: c.top1, "global", "nodes"),
    ),
    "fig4": (
        _Panel(
            "fig4a",
            "Compression, constant local batch",
            "compression",
            lambda r: r.compression,
            _ratio,
            "local",
            "batch",
        ),
        _Panel(
            "fig4b",
            "Compression, constant global batch",
            "compression",
            lambda r: r.compression,
            _ratio,
            "global",
            "nodes",
        ),
    ),
    "fig5": (
        _Panel(
            "fig5a",
            "Scaled interconnect traffic, constant global batch",
            "scaled traffic in GB/s",
            lambda r: r.traffic,
            lambda c: c.traffic,
            "global",
            "nodes",
            log=True,
        ),
        _Panel(
            "fig5b",
            "Time to train, constant global batch",
            "minutes",
            _minutes,
            lambda c: c.minutes,
            "global",
            "nodes",
        ),
    ),
}


def draw(figure: str, found: Sequence[PaperRow], folder: Path, note: str, prefix: str = "") -> list[Figure]:
    """Draws a figure, and writes one PNG file for each of its panels that has data, and for each model.

    Returns the files with their titles and captions, for a page.

    Args:
        figure: a key of PANELS.
        found: the rows of results, one for each cell.
        folder: the folder for the files.
        note: a sentence that ends each caption.
        prefix: the beginning of each file name.
    """
    drawn = []
    for panel in PANELS[figure]:
        shown = [row for row in found if row.cell.scaling == panel.scaling]
        for model in dict.fromkeys(row.cell.model for row in shown):
            here = [row for row in shown if row.cell.model == model]
            file = f"{prefix}{panel.name}-{re.sub('[^a-z0-9]+', '-', model.lower())}.png"
            save(folder / file, _HEIGHT, lambda axes, here=here, panel=panel: _draw(axes, here, panel))  # type: ignore[misc]
            seeds = min(row.seeds for row in here)
            dots = f"Dots are means over {seeds} seeds, bars one standard deviation." if seeds > 1 else "One seed."
            dashed = " Dashed lines are the paper's values." if _published(here[0].cell) else ""
            drawn.append(Figure(file, f"{panel.title}: {model}", f"{dots}{dashed} {note}"))
    return drawn


def draw_ecr(folder: Path) -> Figure:
    """Draws ecr.png, which compares the estimated communication reduction in Table I with the value of eq. 4."""
    found = ecr_rows()[::-1]  # so that the first row of the table is on top
    labels = [f"{row.method.model}, {row.method.name}" for row in found]

    def dots(axes: Axes) -> None:
        for place, row in enumerate(found):
            if row.computed is not None:
                axes.plot([row.method.ecr, row.computed], [place, place], "-", color="#c3cad1", zorder=1)
        computed = [(row.computed, place) for place, row in enumerate(found) if row.computed is not None]
        axes.plot(*zip(*computed, strict=True), "o", color=COLOURS[0], markersize=7, label="eq. 4")
        axes.plot(
            [row.method.ecr for row in found], range(len(found)), "|", color="black", markersize=13, label="paper"
        )
        axes.set_yticks(range(len(labels)), labels)
        axes.set_xlabel("estimated communication reduction in %")
        legend_below(axes)

    save(folder / "ecr.png", 5.2, dots)
    return Figure("ecr.png", "Estimated communication reduction", "Dots are values of eq. 4, bars those of Table I.")


def _draw(axes: Axes, here: Sequence[PaperRow], panel: _Panel) -> None:
    for method in METHODS:
        found = [row for row in here if row.cell.method == method]
        if found:
            _line(axes, found, panel, _GREY if method == DDP else COLOURS[list(METHODS).index(method) - 1])
    axes.set_xscale("log", base=2)
    places = sorted({_place(row.cell, panel) for row in here})
    axes.set_xticks(places, [f"{place:,}" for place in places])
    axes.minorticks_off()
    axes.set_xlabel("global batch" if panel.over == "batch" else "nodes")
    axes.set_ylabel(panel.axis)
    if panel.log:
        axes.set_yscale("log")
    legend_below(axes)


def _line(axes: Axes, found: Sequence[PaperRow], panel: _Panel, colour: str) -> None:
    places = [_place(row.cell, panel) for row in found]
    values = [panel.value(row) for row in found]
    means, deviations = [value.mean for value in values], [value.std for value in values]
    label = found[0].cell.method
    axes.errorbar(places, means, deviations, fmt="o-", color=colour, capsize=3, markersize=6, label=label)
    there = [(place, _paper_value(row.cell, panel)) for place, row in zip(places, found, strict=True)]
    known = [(place, value.mean) for place, value in there if value is not None]
    if known:
        axes.plot(*zip(*known, strict=True), "--", color=colour, alpha=0.6)


def _place(cell: Cell, panel: _Panel) -> int:
    return cell.global_batch if panel.over == "batch" else cell.nodes


def _published(cell: Cell) -> PaperCell | None:
    return TABLE2[cell.scaling].get((cell.model, cell.method, cell.nodes))


def _paper_value(cell: Cell, panel: _Panel) -> Value | None:
    there = _published(cell)
    return None if there is None else panel.paper(there)
