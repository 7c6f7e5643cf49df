"""From outcomes to tables: means and deviations over seeds, beside what the paper has in the same place. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from abtrain.commands.page import Table
from abtrain.commands.paper.experiments import Cell, Scale, Scaling
from abtrain.commands.paper.published import DDP, RESNET, TABLE1, TABLE2_GLOBAL, TABLE2_LOCAL, VIT, Value
from abtrain.commands.paper.runs import PaperOutcome


@dataclass(frozen=True)
class PaperRow:
    """A cell: means and deviations over its seeds.

    Attributes:
        cell: which it is.
        seeds: how many runs.
        top1: in per cent.
        gain: top-1 over that of DDP in the same place, in points; None without it.
        compression: full parameters over factored ones.
        payload_ratio: bytes between nodes, to one float32 gradient of every parameter at every step.
        seconds: of training.
        traffic: scaled traffic in GB/s.
    """

    cell: Cell
    seeds: int
    top1: Value
    gain: float | None
    compression: Value
    payload_ratio: float
    seconds: Value
    traffic: Value


def rows(outcomes: Sequence[PaperOutcome]) -> list[PaperRow]:
    """A row for each cell, in the order of their first runs."""
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
                statistics.fmean(run.payload_ratio for run in runs),
                _value(run.seconds for run in runs),
                _value(run.traffic for run in runs),
            )
        )
    return found


def _value(numbers: Iterable[float]) -> Value:
    """Mean and deviation of a sample; 0 of a single number."""
    values = list(numbers)
    return Value(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0)


def scaling_table(found: Sequence[PaperRow], scaling: Scaling, scale: Scale) -> Table:
    """Table II, or the half of it, beside the paper's values for the same number of nodes."""
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
                spread(row.top1, 2, row.seeds),
                signed(row.gain),
                f"{100 * row.payload_ratio:.2f} %",
                spread(row.compression, 2, row.seeds),
                _traffic_text(row.traffic.mean),
                spread(Value(row.seconds.mean / 60, row.seconds.std / 60), 2, row.seeds),
                *(paper_text(label, cell, scaling) for label in papers or [cell.model]),
            )
        )
    constant = "local" if scaling == "local" else "global"
    title = f"Table II, constant {constant} batch, {scale.name} scale"
    return Table(title, tuple(header), tuple(lines), _scaling_note(scale))


def _scaling_note(scale: Scale) -> str:
    note = (
        "Mean ± standard deviation over seeds. To DDP: points of top-1 over DDP's on as many nodes; bytes of DDP: "
        "what a worker hands to collectives between nodes, over one float32 gradient of every parameter at every step; "
        "traffic: scaled as in the paper. The paper's columns say top-1 (its difference to DDP), traffic over DDP's, "
        "and compression, for the same number of nodes."
    )
    if scale.name == "tiny":
        note += (
            " Workers are simulated in one process, one a node; minutes and traffic are forecast for links of 1 "
            "Gbit/s, from the CPU time of a worker's step."
        )
    return note


def study_table(found: Sequence[PaperRow], title: str) -> Table:
    """A row for each cell, without the paper's."""
    lines = [
        (
            row.cell.method,
            "local batch constant" if row.cell.scaling == "local" else "global batch constant",
            str(row.cell.nodes),
            f"{row.cell.global_batch:,}",
            spread(row.top1, 2, row.seeds),
            signed(row.gain),
            f"{100 * row.payload_ratio:.2f} %",
            spread(row.compression, 2, row.seeds),
            str(row.seeds),
        )
        for row in found
    ]
    header = ("method", "scaling", "nodes", "batch", "top-1 %", "to DDP", "bytes of DDP", "compression", "seeds")
    note = (
        "Fashion-MNIST, the small CNN, one epoch. Mean ± standard deviation over seeds; bytes are those that a worker "
        "hands to collectives between nodes, over one float32 gradient of every parameter at every step."
    )
    return Table(title, header, tuple(lines), note)


def paper_text(label: str, cell: Cell, scaling: Scaling) -> str:
    """Returns the paper's own number for a cell, for one of its models."""
    table = TABLE2_LOCAL if scaling == "local" else TABLE2_GLOBAL
    there, baseline = table.get((label, cell.method, cell.nodes)), table.get((label, DDP, cell.nodes))
    if there is None or there.top1 is None or baseline is None or baseline.top1 is None:
        return "-"
    assert there.traffic is not None and baseline.traffic is not None
    share = 100 * there.traffic.mean / baseline.traffic.mean
    gain = there.top1.mean - baseline.top1.mean
    return f"{there.top1.mean:.2f} ({gain:+.2f}), {share:.0f} %, {there.compression:.2f}"


def comparison_table(found: Sequence[PaperRow], scale: Scale) -> Table:
    """Table I: difference to the baseline, compression and ECR, beside the paper's for other methods."""
    lines = [
        (
            row.cell.model,
            row.cell.method,
            signed(row.gain),
            f"{row.compression.mean:.2f}:1",
            f"{100 - 100 * row.payload_ratio:.2f} %",
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
        "Difference of top-1 to the full-rank model. Of runs here the last column but one is measured: 100 % less the "
        "bytes between nodes over DDP's. The paper's are estimates (eq. 4)."
    )
    header = ("model", "method", "to baseline", "compression", "reduction", "source")
    return Table(f"Table I, {scale.name} scale", header, tuple(lines), note)


def spread(value: Value, digits: int, seeds: int) -> str:
    """Mean and deviation as people write them; the mean alone of a single run."""
    return f"{value.mean:.{digits}f} ± {value.std:.{digits}f}" if seeds > 1 else f"{value.mean:.{digits}f}"


def signed(number: float | None) -> str:
    return "-" if number is None else f"{number:+.2f}"


def _traffic_text(gigabytes: float) -> str:
    return f"{gigabytes:.2f} GB/s" if gigabytes >= 0.1 else f"{1000 * gigabytes:.3g} MB/s"
