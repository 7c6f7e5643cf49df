"""`abtrain compare`: runs several recipes in the lab under the same conditions, and writes a report."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

from abtrain.commands.circumstances import hardware, versions, versions_note
from abtrain.commands.compare.comparison import Comparison, checked, held_folder
from abtrain.commands.compare.plots import draw_all
from abtrain.commands.compare.report import FILE as REPORT_FILE
from abtrain.commands.compare.report import findings, write_report
from abtrain.commands.compare.runs import (
    ComparisonOutcome,
    ComparisonRun,
    outcome,
    plan_runs,
    run_in_lab,
    shared_folders,
)
from abtrain.commands.compare.summary import ComparisonRow, rows, utilisations
from abtrain.commands.files import write_json
from abtrain.commands.lab import Lab
from abtrain.commands.output import Output, breakable, narrow_table
from abtrain.commands.process import stopped_by_signals
from abtrain.commands.runs.folder_run import check_folders, kept_in, run_once, writing
from abtrain.commands.train.config import resolve
from abtrain.commands.units import format_rate, human_bytes, spread

FILE = "compare.json"


def compare(given: argparse.Namespace, command: str) -> None:
    """Executes the runs that are not finished yet, and writes compare.json, the figures and report.html.

    `given` contains the arguments, and `command` is the command line, which compare.json and the report show. If a run
    fails, the results of finished runs remain.

    Raises:
        ConfigurationError: the arguments are invalid, this system cannot run a lab, or folders contain runs with other
            settings. The error lists all problems of that kind, and no run has started.
        DataError: results of earlier runs are damaged. No run has started.
        HostFailedError: a run failed.
        LabError: the lab cannot be built.
        StoppedError: SIGINT, SIGTERM or SIGHUP was received.
    """
    comparison = checked(given)
    console = Output()
    planned = plan_runs(comparison)
    with stopped_by_signals(kept_in(comparison.out)), held_folder(comparison):
        check_folders(planned, comparison.overwrite, shared_folders(planned))
        run_once(planned, _runner(comparison), console.plain, lambda run: _in_short(outcome(run)))
        outcomes = [outcome(run) for run in planned]
    with writing(comparison.out):
        found = write_results(comparison, outcomes, command)
    show(found, console)
    if note := versions_note(outcome.version for outcome in outcomes):
        console.print(note)
    console.plain(f"written to {comparison.out / REPORT_FILE}")


def write_results(comparison: Comparison, outcomes: Sequence[ComparisonOutcome], command: str) -> list[ComparisonRow]:
    """Writes compare.json, the figures and report.html. Returns the rows of the table."""
    rate, workers = comparison.lab.rate(0), comparison.lab.nodes * comparison.lab.workers_per_node
    found = rows([outcome for outcome in outcomes if outcome.rate == rate], workers)
    record = _record(comparison, found, outcomes, command)
    write_json(comparison.out / FILE, record)
    figures = draw_all(found, outcomes, rate, comparison.out)
    write_report(record, found, figures, comparison.out)
    return found


@contextlib.contextmanager
def _runner(comparison: Comparison) -> Iterator[Callable[[ComparisonRun], None]]:
    """Builds a lab that exists inside the context, and yields a function that executes one run in it."""
    with Lab(comparison.lab) as lab:
        yield lambda run: run_in_lab(run, lab, comparison.overwrite)


def _in_short(result: ComparisonOutcome) -> str:
    loss = "not finite" if result.loss is None else f"{result.loss:.3f}"
    score = f"loss {loss}" if result.top1 is None else f"top-1 {result.top1:.2f}"
    return f"{score}, {human_bytes(result.wire_bytes)} per host, {result.seconds:.1f} s"


def _record(
    comparison: Comparison, found: Sequence[ComparisonRow], outcomes: Sequence[ComparisonOutcome], command: str
) -> dict[str, Any]:
    """Returns the content of compare.json: sizes in bytes, rates in bits per second, and ratios as fractions of 1."""
    return {
        "command": command,
        "settings": comparison.settings(),
        "link": format_rate(comparison.lab.rate(0)),
        "learning_rates": {entry.label: resolve(entry.config).lr for entry in comparison.contestants},
        "rows": [asdict(row) for row in found],
        "utilisation": {
            label: [{"rate": rate, "utilisation": value} for rate, value in points]
            for label, points in utilisations(outcomes).items()
        },
        "runs": [asdict(outcome) for outcome in outcomes],
        "versions": versions(),
        "hardware": hardware(),
        "note": versions_note(outcome.version for outcome in outcomes),
    }


def show(found: Sequence[ComparisonRow], console: Output) -> None:
    """Prints the findings and the table of a comparison."""
    for finding in findings(found):
        console.print(finding)
    score = "loss" if found[0].top1 is None else "top-1"
    table = narrow_table()
    table.add_column("recipe")
    for column in (score, "wire", "of ddp", "seconds", "of bf16", "used", "comp."):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found:
        mean, deviation = (row.loss, row.loss_std) if row.top1 is None else (row.top1, row.top1_std)
        table.add_row(
            breakable(row.label),
            spread(mean, deviation),
            human_bytes(row.wire_bytes),
            f"{row.wire_ratio:.2%}",
            f"{row.seconds:.1f}",
            f"{row.seconds_ratio:.2f}",
            f"{row.utilisation:.0%}",
            f"{row.compression:.2f}",
        )
    console.print()
    console.print(table)
    console.print(
        "\nwire: bytes that a host sent. of bf16: seconds over those of ddp:wire=bf16. used: share of the time spent "
        "computing. comp.: parameters of the full model over those of the factored one."
    )
