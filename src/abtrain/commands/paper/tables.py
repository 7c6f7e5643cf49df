"""Builds tables of results: means and standard deviations over seeds, and the paper's values."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from abtrain.commands.page import Table
from abtrain.commands.paper.experiments import Cell, Scale, Scaling
from abtrain.commands.paper.published import DDP, RESNET, TABLE1, TABLE2, VIT, Value
from abtrain.commands.paper.runs import PaperOutcome
from abtrain.commands.units import human_bytes, spread


@dataclass(frozen=True)
class PaperRow:
    """The means and standard deviations over the seeds of a cell.

    Attributes:
        cell: the method and settings of the runs.
        seeds: the number of runs.
        top1: the validation accuracy in percent.
        gain: the top-1 accuracy minus that of DDP with the same model and nodes, in percentage points; None without a
            run of DDP.
        compression: the parameters of the full model divided by those of the factored model.
        internode_ratio: the payload between nodes divided by that of DDP, which sends all gradients in float32 at every
            step.
        seconds: the seconds of training.
        traffic: the scaled traffic of a node in GB/s, as defined for Table II.
    """

    cell: Cell
    seeds: int
    top1: Value
    gain: float | None
    compression: Value
    internode_ratio: float
    seconds: Value
    traffic: Value


def rows(outcomes: Sequence[PaperOutcome]) -> list[PaperRow]:
    """Returns one row for each cell, in the order in which the cells first appear in `outcomes`."""
    by_cell: dict[Cell, list[PaperOutcome]] = {}
    for outcome in outcomes:
        by_cell.setdefault(outcome.cell, []).append(outcome)
    baselines = {
        (cell.scaling, cell.model, cell.nodes): statistics.fmean(run.top1 for run in runs)
        for cell, runs in by_cell.items()
        if cell.method == DDP
    }
    found = []
    for cell, runs in by_cell.items():
        top1 = _value(run.top1 for run in runs)
        baseline = baselines.get((cell.scaling, cell.model, cell.nodes))
        found.append(
            PaperRow(
                cell,
                len(runs),
                top1,
                None if baseline is None else top1.mean - baseline,
                _value(run.compression for run in runs),
                statistics.fmean(run.internode_ratio for run in runs),
                _value(run.seconds for run in runs),
                _value(run.traffic for run in runs),
            )
        )
    return found


def _value(numbers: Iterable[float]) -> Value:
    """Returns the mean and the sample standard deviation, which is 0 for a single number."""
    values = list(numbers)
    return Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def scaling_table(found: Sequence[PaperRow], scaling: Scaling, scale: Scale) -> Table:
    """Returns the half of Table II with this scaling, with the paper's values for the same number of nodes."""
    papers = [VIT, RESNET] if scale.name == "tiny" else []
    header = ["model", "nodes", "batch", "method", "top-1 %", "to DDP", "bytes of DDP", "compr.", "traffic", "minutes"]
    header += [f"paper, {label}" for label in papers] or ["paper"]
    lines = []
    for row in (row for row in found if row.cell.scaling == scaling):
        cell = row.cell
        lines.append(
            (
                cell.model,
                str(cell.nodes),
                f"{cell.global_batch:,}",
                cell.method,
                _spread(row.top1, row.seeds),
                signed(row.gain),
                f"{100 * row.internode_ratio:.2f} %",
                _spread(row.compression, row.seeds),
                f"{human_bytes(1e9 * row.traffic.mean)}/s",
                _spread(Value(row.seconds.mean / 60, row.seconds.std / 60), row.seeds),
                *(paper_text(label, cell, scaling) for label in papers or [cell.model]),
            )
        )
    title = f"Table II, constant {scaling} batch, {scale.name} scale"
    return Table(title, tuple(header), tuple(lines), _scaling_note(scale))


def _scaling_note(scale: Scale) -> str:
    note = (
        "Mean ± standard deviation over seeds. `to DDP` is the difference in top-1 to DDP on as many nodes, in points. "
        "`bytes of DDP` are the bytes that a node hands to collectives between nodes, over one float32 gradient of "
        "every parameter at every step. Traffic is scaled as in the paper. The paper's columns give top-1 (difference "
        "to DDP), traffic over that of DDP, and compression, for the same number of nodes."
    )
    if scale.name == "tiny":
        note += (
            " Workers are simulated in one process, one per node. Minutes and traffic are forecasts for links of 1 "
            "Gbit/s, from the CPU time of a worker's step."
        )
    return note


def study_table(found: Sequence[PaperRow], title: str) -> Table:
    """Returns a table with a row for each cell, without the paper's values."""
    lines = [
        (
            row.cell.method,
            "local batch constant" if row.cell.scaling == "local" else "global batch constant",
            str(row.cell.nodes),
            f"{row.cell.global_batch:,}",
            _spread(row.top1, row.seeds),
            signed(row.gain),
            f"{100 * row.internode_ratio:.2f} %",
            _spread(row.compression, row.seeds),
            str(row.seeds),
        )
        for row in found
    ]
    header = ("method", "scaling", "nodes", "batch", "top-1 %", "to DDP", "bytes of DDP", "compression", "seeds")
    note = (
        "The small CNN on Fashion-MNIST, one epoch. Mean ± standard deviation over seeds. `bytes of DDP` are the bytes "
        "that a worker hands to collectives between nodes, over one float32 gradient of every parameter at every step."
    )
    return Table(title, header, tuple(lines), note)


def paper_text(label: str, cell: Cell, scaling: Scaling) -> str:
    """Returns the paper's values for model `label`, with the method and nodes of `cell`, as text for a table."""
    table = TABLE2[scaling]
    there, baseline = table.get((label, cell.method, cell.nodes)), table.get((label, DDP, cell.nodes))
    if there is None or there.top1 is None or baseline is None or baseline.top1 is None:
        return "-"
    assert there.traffic is not None and baseline.traffic is not None
    share = 100 * there.traffic.mean / baseline.traffic.mean
    gain = there.top1.mean - baseline.top1.mean
    return f"{there.top1.mean:.2f} ({gain:+.2f}), {share:.0f} %, {there.compression:.2f}"


def comparison_table(found: Sequence[PaperRow], scale: Scale) -> Table:
    """Returns Table I, with the accuracy relative to the baseline, the compression and the communication reduction.

    The table also has the paper's values for all methods.
    """
    lines = [
        (
            row.cell.model,
            row.cell.method,
            signed(row.gain),
            f"{row.compression.mean:.2f}:1",
            f"{100 - 100 * row.internode_ratio:.2f} %",
            "measured here",
        )
        for row in found
    ]
    labels = {row.cell.model for row in found}
    for method in TABLE1:
        if scale.name == "tiny" or method.model in labels:
            compression = f"{method.compression:.2f}:1"
            lines.append(
                (method.model, method.name, signed(method.difference), compression, f"{method.ecr:.2f} %", "the paper")
            )
    note = (
        "`to baseline` is the difference in top-1 to the full-rank model. The reduction of runs here is measured: "
        "100 % minus the bytes between nodes over those of DDP. The reductions of the paper are estimates (eq. 4)."
    )
    header = ("model", "method", "to baseline", "compression", "reduction", "source")
    return Table(f"Table I, {scale.name} scale", header, tuple(lines), note)


def _spread(value: Value, seeds: int) -> str:
    return spread(value.mean, value.std if seeds > 1 else None)


def signed(number: float | None) -> str:
    return "-" if number is None else f"{number:+.2f}"
