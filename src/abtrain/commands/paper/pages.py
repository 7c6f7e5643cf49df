"""Writes an HTML page for each experiment and study, and also a Markdown page for each study."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abtrain.commands.circumstances import versions
from abtrain.commands.figures import COLOURS, Figure, legend_below, plain_numbers, save
from abtrain.commands.files import write_whole
from abtrain.commands.page import Page, Table, remarked, write_page
from abtrain.commands.paper.figures import draw
from abtrain.commands.paper.runs import PaperRun
from abtrain.commands.paper.studies import STUDIES
from abtrain.commands.paper.tables import PaperRow, study_table
from abtrain.commands.runs.result_files import read_record
from abtrain.lowrank.names import factor_letter, weight_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MARKERS = "os^Dvp*XPh"
_LEAD = "Experiments of AB-training (Coquelin et al., arXiv 2405.01067). All numbers are from runs in this folder."
_NOTE = "Workers are simulated, one per node."
_AXES: dict[str, tuple[str, Callable[[PaperRow], float]]] = {
    "bytes": ("bytes between nodes, % of DDP's", lambda row: 100 * row.internode_ratio),
    "compression": ("compression", lambda row: row.compression.mean),
}


def write_paper_page(name: str, title: str, parts: Sequence[Table | Figure], folder: Path, command: str) -> Path:
    """Writes NAME.html into the folder of the experiments, and returns its path."""
    path = folder / f"{name}.html"
    write_page(Page(title, _LEAD, parts, {"command": command, **versions()}), path)
    return path


def write_study(
    name: str, found: Sequence[PaperRow], runs: Sequence[PaperRun], folder: Path, command: str, remark: str = ""
) -> list[Table]:
    """Writes NAME.html, NAME.md and the figures of a study. Returns the tables.

    Args:
        name: the name of the study, a key of STUDIES.
        found: the rows of results, one for each cell of the study.
        runs: the runs of the study. All of them are finished.
        folder: the folder of the experiments.
        command: the command line that the pages show.
        remark: a sentence that is added to the notes of all tables.

    Raises:
        DataError: a result file is damaged.
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
    """Splits the label of a method: `AB, sigma 0.3` is the series `AB, sigma` with the setting 0.3."""
    found = re.fullmatch(r"(.+)[ :]([0-9.]+)", label)
    return (found[1], found[2]) if found else (label, "")


def _histories(run: PaperRun) -> dict[str, list[tuple[float, dict[str, float]]]]:
    """Returns how far workers differed at each merge of a run: a list of (step, distances) for each layer.

    Raises:
        DataError: the result file is damaged.
    """
    found: dict[str, list[tuple[float, dict[str, float]]]] = {}
    for entry in read_record(run.result_file).records("divergence"):
        for layer in entry.mapping("layers"):
            distances = entry.numbers("layers", layer)
            if "distance" not in distances:
                raise entry.error(("layers", layer), distances, "an object with the number `distance`")
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
        caption = f"sqrt(mean |X_i - X|^2) / |X| at each merge, by layer, for seed 0. {_NOTE}"
        figures.append(Figure(file, title, caption))
    return figures


def _divergence_table(runs: Sequence[PaperRun]) -> Table:
    """Returns a table with the mean and the largest distance between workers at merges, by run and layer."""
    lines = []
    for run in (run for run in runs if run.seed == 0):
        for layer, history in _histories(run).items():
            numbers: list[str] = []
            for name in ("distance", "subspace"):
                values = [distances[name] for _, distances in history if name in distances]
                numbers += [f"{statistics.fmean(values):.3f}", f"{max(values):.3f}"] if values else ["-", "-"]
            lines.append((run.cell.method, str(run.cell.nodes), layer, str(len(history)), *numbers))
    header = ("method", "nodes", "layer", "merges", "distance, mean", "largest", "subspace, mean", "largest")
    note = (
        "Seed 0. Distance is that of workers to their average, over the norm of the average. Subspace is 0 for equal "
        "subspaces and 1 for orthogonal ones."
    )
    return Table("Divergence by layer", header, tuple(lines), note)


def _cell(text: str) -> str:
    """Escapes a string for a table in Markdown. Layer names from result files may contain any characters."""
    return html.escape(text, quote=False).replace("|", "\\|").replace("\n", " ")


def _markdown(question: str, tables: Sequence[Table], figures: Sequence[Figure], command: str) -> str:
    """Returns the page of a study in Markdown."""
    parts = [f"# {question}", f"    {command}", _NOTE]
    for table in tables:
        rule = "|".join("---" for _ in table.header)
        body = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in table.lines)
        parts += [f"## {table.title}", f"| {' | '.join(table.header)} |\n|{rule}|\n{body}", table.note]
    for figure in figures:
        parts += [f"![{figure.title}]({figure.file})", figure.caption]
    return "\n\n".join(parts) + "\n"
