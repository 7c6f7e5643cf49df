"""`abtrain paper`: runs the paper's experiments and studies, and writes their tables, figures and pages."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table as Printed

from abtrain.commands.circumstances import versions_note
from abtrain.commands.files import write_json
from abtrain.commands.page import Table, remarked
from abtrain.commands.paper.arguments import ECR, HPO, PaperRequest, parse_arguments
from abtrain.commands.paper.experiments import FIGURES, SCALING_TABLES, Cell, cells
from abtrain.commands.paper.figures import draw, draw_ecr
from abtrain.commands.paper.listing import ecr_table, plan_tables, traffic_table
from abtrain.commands.paper.pages import write_paper_page, write_study
from abtrain.commands.paper.runs import (
    LAUNCHER,
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
from abtrain.commands.runs.folder_run import check_folders, writing
from abtrain.commands.tasks.task import TASKS
from abtrain.errors import ConfigurationError

_WIDTH = 200
_TINY_NOTE = "Workers are simulated, one per node. Times and traffic are forecasts for links of 1 Gbit/s."


def main(arguments: Sequence[str]) -> None:
    """Runs `abtrain paper`.

    Raises:
        ConfigurationError: lists everything that is wrong with the arguments, all folders that contain runs with other
            settings, or the missing runs of a figure.
        DataError: the data is not available, or results of earlier runs are damaged.
        AbtrainError: a run failed. Finished runs are kept.
        StoppedError: SIGINT, SIGTERM or SIGHUP was received. Finished runs are kept.
    """
    request, command = parse_arguments(arguments), shlex.join(("abtrain", "paper", *arguments))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    if request.experiment == ECR:
        _print(console, ecr_table())
        if request.draws:
            with writing(request.out):
                request.out.mkdir(parents=True, exist_ok=True)
                file = draw_ecr(request.out).file
            console.print(f"written to {request.out / file}")
    elif request.arithmetic:
        _print(console, traffic_table("local" if request.experiment == "table2-local" else "global"))
    elif request.experiment == HPO:
        from abtrain.commands.paper.search import search

        with stopped_by_signals():
            search(request, console, command)
    else:
        _experiment(request, console, command)


def _experiment(request: PaperRequest, console: Console, command: str) -> None:
    if request.experiment in STUDIES:
        chosen = study_cells(request.experiment, request.nodes, request.methods)
    else:
        chosen = cells(request.experiment, request.scale, request.nodes, request.methods)
    if not chosen:
        raise ConfigurationError(
            f"{request.experiment} has no runs with these --methods and --nodes: name others, or leave them out"
        )
    if request.dry_run:
        for table in plan_tables(chosen, request.seeds):
            _print(console, table)
        return
    runs = plan_runs(chosen, request.seeds, request.out)
    check_folders(runs, request.overwrite)
    if request.write:
        for run in runs:
            prepare_folder(run, request.overwrite, checkpoints=True)
            console.print(shlex.join(launch_command(run, request.launcher, request.data)))
        return
    if request.experiment in FIGURES and not request.run:
        _require(runs, request)
    if not all(run.done for run in runs):
        for task in dict.fromkeys(run.config.task for run in runs):
            TASKS[task].find(request.data)
    with stopped_by_signals():
        run_all(runs, request.scale.name, request.launcher, request.data, console.print, request.overwrite)
    found = _outcomes(chosen, runs)
    remark = versions_note(outcome.version for outcome in found)
    with writing(request.out):
        if request.experiment in STUDIES:
            tables = write_study(request.experiment, rows(found), runs, request.out, command, remark)
        else:
            tables = _write(request, found, command, remark)
    for table in tables:
        _print(console, table)
    console.print(f"written to {request.out / request.experiment}.html")


def _outcomes(chosen: Sequence[Cell], runs: Sequence[PaperRun]) -> list[PaperOutcome]:
    """Returns the outcomes of all cells. Several cells may share a run."""
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
    """Converts a value to the types of JSON."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | float | bool | None) else str(value)


def _require(runs: Sequence[PaperRun], request: PaperRequest) -> None:
    """Checks that all runs of a figure are done.

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


def _print(console: Console, table: Table) -> None:
    printed = Printed(*table.header, box=SIMPLE, padding=(0, 1), title=table.title, title_justify="left")
    for line in table.lines:
        printed.add_row(*line)
    Console(width=max(console.width, _WIDTH), highlight=False, markup=False).print(printed)
    console.print(table.note)
