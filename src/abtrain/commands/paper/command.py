"""`abtrain paper`: runs the paper's experiments and studies, and writes their tables, figures and pages."""

from __future__ import annotations

import dataclasses
import itertools
import shlex
from collections.abc import Sequence
from typing import Any

from abtrain.commands.circumstances import versions_note
from abtrain.commands.files import write_json
from abtrain.commands.output import Output, narrow_table
from abtrain.commands.page import Table, kinds, remarked
from abtrain.commands.paper.arguments import ECR, HPO, LAUNCHER, PaperRequest
from abtrain.commands.paper.experiments import FIGURES, SCALING_TABLES, Cell, cells
from abtrain.commands.paper.figures import draw, draw_ecr
from abtrain.commands.paper.listing import ecr_table, plan_tables, traffic_table
from abtrain.commands.paper.pages import write_paper_page, write_study
from abtrain.commands.paper.runs import (
    PaperOutcome,
    PaperRun,
    launch_command,
    outcome,
    plan_runs,
    prepare_folder,
    run_all,
)
from abtrain.commands.paper.studies import STUDIES, study_cells
from abtrain.commands.paper.tables import comparison_table, rows, scaling_table
from abtrain.commands.process import stopped_by_signals
from abtrain.commands.runs.folder_run import check_folders, kept_in, writing
from abtrain.commands.tasks.task import TASKS
from abtrain.errors import ConfigurationError

_KEYS = frozenset({"model", "method", "scaling", "nodes", "batch"})
"""The names of columns that identify a row."""
_TEXT_WIDTH = 28
"""The number of characters up to which a text in a table is not wrapped."""
_GAP = 2
"""The number of characters between two columns of a table."""
_TINY_NOTE = "Workers are simulated, one per node. Times and traffic are forecasts for links of 1 Gbit/s."


def paper(request: PaperRequest, command: str) -> None:
    """Runs `abtrain paper`. `command` is its command line, which the pages that it writes show.

    Raises:
        ConfigurationError: folders contain runs with other settings, or runs that a figure
            shows are missing. The error lists all problems of that kind.
        DataError: the data is not available, or results of earlier runs are damaged.
        AbtrainError: a run failed. Finished runs are kept.
        StoppedError: SIGINT, SIGTERM or SIGHUP was received. Finished runs are kept.
    """
    console = Output()
    if request.experiment == ECR:
        show(ecr_table(), console)
        if request.draws:
            with writing(request.out):
                request.out.mkdir(parents=True, exist_ok=True)
                file = draw_ecr(request.out).file
            console.plain(f"written to {request.out / file}")
    elif request.arithmetic:
        show(traffic_table("local" if request.experiment == "table2-local" else "global"), console)
    elif request.experiment == HPO:
        from abtrain.commands.paper.search import search

        with stopped_by_signals(kept_in(request.out)):
            search(request, console, command)
    else:
        _experiment(request, console, command)


def _experiment(request: PaperRequest, console: Output, command: str) -> None:
    if request.experiment in STUDIES:
        chosen = study_cells(request.experiment, request.nodes, request.methods)
    else:
        chosen = cells(request.experiment, request.scale, request.nodes, request.methods)
    if not chosen:
        raise ConfigurationError(
            f"{request.experiment} has no runs with these --methods and --nodes: use others, or leave out both options"
        )
    if request.dry_run:
        for table in plan_tables(chosen, request.seeds):
            show(table, console)
        return
    runs = plan_runs(chosen, request.seeds, request.out)
    check_folders(runs, request.overwrite)
    if request.write:
        for run in runs:
            prepare_folder(run, request.overwrite, checkpoints=True)
            console.plain(shlex.join(launch_command(run, request.launcher, request.data)))
        return
    if request.experiment in FIGURES and not request.run:
        _require(runs, request)
    if not all(run.done for run in runs):
        for task in dict.fromkeys(run.config.task for run in runs):
            TASKS[task].find(request.data)
    with stopped_by_signals(kept_in(request.out)):
        run_all(runs, request.scale.name, request.launcher, request.data, console.plain, request.overwrite)
    found = _outcomes(chosen, runs)
    remark = versions_note(outcome.version for outcome in found)
    with writing(request.out):
        if request.experiment in STUDIES:
            tables = write_study(request.experiment, rows(found), runs, request.out, command, remark)
        else:
            tables = _write(request, found, command, remark)
    for table in tables:
        show(table, console)
    console.plain(f"written to {request.out / request.experiment}.html")


def _outcomes(chosen: Sequence[Cell], runs: Sequence[PaperRun]) -> list[PaperOutcome]:
    """Returns the outcomes of all cells with all seeds. Several cells may have the same run."""
    by_settings = {(str(run.cell.config), run.seed): outcome(run) for run in runs}
    seeds = sorted({run.seed for run in runs})
    return [dataclasses.replace(by_settings[str(cell.config), seed], cell=cell) for cell in chosen for seed in seeds]


def _write(request: PaperRequest, outcomes: Sequence[PaperOutcome], command: str, remark: str) -> list[Table]:
    """Writes EXPERIMENT.json, the figures and EXPERIMENT.html. Returns the tables, with a remark in their notes."""
    name, scale, out = request.experiment, request.scale, request.out
    found = rows(outcomes)
    record: dict[str, Any] = {"command": command, "rows": [dataclasses.asdict(row) for row in found]}
    write_json(out / f"{name}.json", _plain(record))
    note = _TINY_NOTE if scale.name == "tiny" else ""
    scalings = list(dict.fromkeys(row.cell.scaling for row in found))
    figures = draw(name, found, out, note) if name in FIGURES else []
    if name == "table1":
        tables = [comparison_table(found, scale)]
    else:
        tables = [scaling_table(found, scaling, scale) for scaling in scalings]
        of_table = [figure for figure in FIGURES if FIGURES[figure] == tuple(scalings) and name not in FIGURES]
        figures += [panel for figure in of_table for panel in draw(figure, found, out, note)]
    tables = remarked(tables, remark)
    write_paper_page(name, f"{name}, {scale.name} scale", [*tables, *figures], out, command)
    return tables


def _plain(value: Any) -> Any:
    """Converts a value to the types of JSON. A value of any other type becomes a string."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _require(runs: Sequence[PaperRun], request: PaperRequest) -> None:
    """Checks that all runs that a figure shows have finished.

    Raises:
        ConfigurationError: some runs are missing. The message names the commands that execute them.
    """
    missing = [run for run in runs if not run.done]
    if not missing:
        return
    options = {
        "--scale": request.scale.name,
        "--seeds": request.seeds,
        "--nodes": ",".join(map(str, request.nodes)),
        "--methods": ";".join(request.methods),
        "--launcher": "" if request.launcher == LAUNCHER else request.launcher,
        "--data": request.data or "",
        "--out": request.out,
    }
    given = [str(part) for option in options.items() if option[1] != "" for part in option]
    tables = [SCALING_TABLES[scaling] for scaling in FIGURES[request.experiment]]
    commands = [f"`{shlex.join(('abtrain', 'paper', table, *given))}`" for table in tables]
    raise ConfigurationError(
        f"{request.experiment} needs {len(runs)} runs, and {len(missing)} are missing, such as {missing[0]}: run "
        f"{' and '.join(commands)} first, or add --run"
    )


def show(table: Table, console: Output) -> None:
    """Prints a table with its note. Columns that do not fit the width follow in a further table with the same rows."""
    console.print(f"{table.title}\n")
    sorts = kinds(table)
    columns = list(zip(table.header, *table.lines, strict=True))
    least = [_least_width(texts, kind) for texts, kind in zip(columns, sorts, strict=True)]
    whole = [max(map(len, texts)) for texts in columns]
    keys = len(list(itertools.takewhile(_KEYS.__contains__, table.header))) or 1
    for part in _parts(least, keys, console.width):
        widths = _widths(part, least, whole, console.width)
        printed = narrow_table()
        for index in part:
            justify: Any = "right" if sorts[index] == "number" else "left"
            printed.add_column(table.header[index], justify=justify, width=widths[index])
        for line in table.lines:
            printed.add_row(*(line[index] for index in part))
        console.print(printed)
        console.print()
    console.print(f"{table.note}\n")


def _least_width(texts: Sequence[str], kind: str) -> int:
    """Returns the smallest width of a column that wraps no number and no short text, and breaks no word."""
    longest = max(map(len, texts[1:]), default=0)
    words = [len(word) for text in texts for word in text.split()]
    return max([*words, longest if kind == "number" else min(longest, _TEXT_WIDTH)])


def _widths(part: Sequence[int], least: Sequence[int], whole: Sequence[int], width: int) -> dict[int, int]:
    """Returns the width of each column in `part`: at least its least width, and more if the line has room."""
    room = width - sum(least[index] + _GAP for index in part) + _GAP
    widths = {}
    for index in part:
        widths[index] = max(least[index], min(whole[index], least[index] + room))
        room -= widths[index] - least[index]
    return widths


def _parts(least: Sequence[int], keys: int, width: int) -> list[list[int]]:
    """Distributes columns, by index, over as few tables as fit the width. Each table begins with the key columns."""
    parts = [list(range(keys))]
    for index in range(keys, len(least)):
        taken = sum(least[other] + _GAP for other in parts[-1])
        if taken + least[index] > width and len(parts[-1]) > keys:
            parts.append(list(range(keys)))
        parts[-1].append(index)
    return parts
