"""The results of a study: its table, its figures, and a page in HTML and Markdown."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abtrain.commands.figures import COLOURS, Figure, legend_below, plain_numbers, save
from abtrain.commands.files import write_whole
from abtrain.commands.page import Table, remarked
from abtrain.commands.paper.figures import draw
from abtrain.commands.paper.page import write_paper_page
from abtrain.commands.paper.runs import PaperRun
from abtrain.commands.paper.studies import STUDIES
from abtrain.commands.paper.tables import PaperRow, study_table
from abtrain.commands.runs.result_files import read_record
from abtrain.lowrank.names import factor_letter, weight_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "os^Dvp*XPh"
_NOTE = "Simulated workers, one a node."
_AXES: dict[str, tuple[str, Callable[[PaperRow], float]]] = {
    "bytes": ("bytes between nodes, % of DDP's", lambda row: 100 * row.payload_ratio),
    "compression": ("compression", lambda row: row.compression.mean),
}


def write_study(
    name: str, found: Sequence[PaperRow], runs: Sequence[PaperRun], folder: Path, command: str, remark: str = ""
) -> list[Table]:
    """Writes NAME.html, NAME.md and the figures; returns the tables.

    Args:
        name: a key of STUDIES.
        found: rows of its cells.
        runs: that they are of, all done.
        folder: of the experiments.
        command: that made it.
        remark: on all tables.

    Raises:
        DataError: a result is damaged.
    """
    study = STUDIES[name]
    tables = [study_table(found, study.question)]
    if study.shown == "divergence":
        figures = _divergence_figures(name, runs, folder)
        tables.append(_divergence_table(runs))
    elif study.shown == "batch":
        figures = [panel for figure in ("fig2", "fig3") for panel in draw(figure, found, folder, _NOTE, f"{name}-")]
    else:
        figures = [_scatter_figure(name, found, folder)]
    tables = remarked(tables, remark)
    write_paper_page(name, study.question, [*tables, *figures], folder, command)
    write_whole(folder / f"{name}.md", _markdown(study.question, tables, figures, command))
    return tables


def _scatter_figure(name: str, found: Sequence[PaperRow], folder: Path) -> Figure:
    study = STUDIES[name]
    axis, value = _AXES[study.shown]

    def scatter(axes: Axes) -> None:
        series: dict[str, list[PaperRow]] = {}
        for row in found:
            series.setdefault(_series(row.cell.method)[0], []).append(row)
        for i, (label, rows) in enumerate(series.items()):
            rows.sort(key=value)
            style: dict[str, Any] = {"color": COLOURS[i % len(COLOURS)], "marker": _MARKERS[i % len(_MARKERS)]}
            means, deviations = [row.top1.mean for row in rows], [row.top1.std for row in rows]
            axes.errorbar([*map(value, rows)], means, deviations, capsize=3, linewidth=1.2, label=label, **style)
            settings: dict[tuple[float, float], list[str]] = {}
            for row in rows:
                settings.setdefault((value(row), row.top1.mean), []).append(_series(row.cell.method)[1])
            for place, names in settings.items():
                offset = (0, 7 if i % 2 else -15)
                axes.annotate(", ".join(names), place, offset, textcoords="offset points", ha="center", fontsize=8)
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.set_xlabel(axis)
        axes.set_ylabel("top-1 in %")
        legend_below(axes)

    save(folder / f"{name}.png", 5.2, scatter)
    seeds = min(row.seeds for row in found)
    bars = f"Means over {seeds} seeds, bars one standard deviation." if seeds > 1 else "One seed."
    return Figure(f"{name}.png", f"Accuracy over {study.shown}", f"{bars} {_NOTE}")


def _series(label: str) -> tuple[str, str]:
    """Which line a method's point is on, and the setting that tells it from the line's others."""
    found = re.fullmatch(r"(.+)[ :]([0-9.]+)", label)
    return (found[1], found[2]) if found else (label, "")


def _histories(run: PaperRun) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """By layer, (step, distances) of every merge of the run."""
    found: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for entry in read_record(run.result_file).records("divergence"):
        for layer in entry.mapping("layers"):
            distances = entry.numbers("layers", layer)
            if "distance" not in distances:
                raise entry.error(("layers", layer), distances, "an object with a distance")
            found.setdefault(layer, []).append((entry.number("step"), distances))
    return found


def _divergence_figures(name: str, runs: Sequence[PaperRun], folder: Path) -> list[Figure]:
    figures = []
    for run in (run for run in runs if run.seed == 0):
        histories = _histories(run)

        def lines(axes: Axes, histories: dict[str, Any] = histories) -> None:
            weights = list(dict.fromkeys(weight_name(layer) for layer in histories))
            for layer, history in histories.items():
                steps = [step for step, _ in history]
                values = [distances["distance"] for _, distances in history]
                dash = "--" if factor_letter(layer) == "B" else "-"
                colour = COLOURS[weights.index(weight_name(layer)) % len(COLOURS)]
                axes.plot(steps, values, dash, color=colour, label=layer)
            axes.set_yscale("log")
            axes.set_xlabel("step")
            axes.set_ylabel("distance of workers at merges")
            axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper center", bbox_to_anchor=(0.46, -0.16))

        file = f"{name}-{re.sub('[^a-z0-9]+', '-', f'{run.cell.method} {run.cell.nodes}'.lower())}.png"
        save(folder / file, 5.6, lines)
        title = f"{run.cell.method}, {run.cell.nodes} nodes"
        figures.append(Figure(file, title, f"Each merge of seed 0: sqrt(mean |X_i - X|^2) / |X|, by layer. {_NOTE}"))
    return figures


def _divergence_table(runs: Sequence[PaperRun]) -> Table:
    """Tabulates each layer's distances over all merges of a run, whose learning rate ends at zero."""
    lines = []
    for run in (run for run in runs if run.seed == 0):
        for layer, history in _histories(run).items():
            numbers: list[str] = []
            for name in ("distance", "subspace"):
                values = [distances[name] for _, distances in history if name in distances]
                numbers += [f"{statistics.fmean(values):.3f}", f"{max(values):.3f}"] if values else ["-", "-"]
            lines.append((run.cell.method, str(run.cell.nodes), layer, str(len(history)), *numbers))
    header = ("method", "nodes", "layer", "merges", "distance, mean", "largest", "subspace, mean", "largest")
    note = "Seed 0. Distance: of workers to their average, over its norm. Subspace: 0 the same, 1 nothing in common."
    return Table("Divergence by layer", header, tuple(lines), note)


def _cell(text: str) -> str:
    """Text in a table of Markdown, where HTML would be HTML. Names of layers are whatever a result says."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _markdown(question: str, tables: Sequence[Table], figures: Sequence[Figure], command: str) -> str:
    """The same page for a repository."""
    parts = [f"# {question}", f"    {command}", _NOTE]
    for table in tables:
        rule = "|".join("---" for _ in table.header)
        body = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in table.lines)
        parts += [f"## {table.title}", f"| {' | '.join(table.header)} |\n|{rule}|\n{body}", table.note]
    for figure in figures:
        parts += [f"![{figure.title}]({figure.file})", figure.caption]
    return "\n\n".join(parts) + "\n"
