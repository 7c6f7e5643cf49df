"""The report of a comparison: one HTML page with findings, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abtrain.commands.compare.contestants import DDP, DDP_BF16, REFERENCES, SOLO
from abtrain.commands.compare.summary import ComparisonRow
from abtrain.commands.figures import Figure
from abtrain.commands.page import Page, Table, remarked, write_page
from abtrain.commands.units import human_bytes

FILE = "report.html"
_NOTE = (
    "The hosts are emulated on one machine. Their links are shaped by token buckets, without added delay. Runs took "
    "place one after the other, so other load on the machine is in their seconds: a utilisation above 100 % means that "
    "the machine was busier while solo ran. All numbers are in compare.json; the settings, metrics and interface "
    "counters of each run are in runs/."
)


def write_report(
    record: Mapping[str, Any], rows: Sequence[ComparisonRow], figures: Sequence[Figure], folder: Path
) -> None:
    """Writes report.html.

    Args:
        record: the content of compare.json.
        rows: of the table.
        figures: whose files are in the folder.
        folder: of the comparison.
    """
    settings = record["settings"]
    nodes, per_node, steps = settings["nodes"], settings["workers_per_node"], settings["steps"]
    lead = (
        f"{nodes} hosts with {per_node} worker{'s' if per_node > 1 else ''} each, every link {record['link']}, "
        f"{steps:,} steps. Steps, seeds and order of the data are the same for all."
    )
    (table,) = remarked([_results_table(rows)], record["note"])
    page = Page(
        title=f"{settings['task']}: recipes compared",
        lead=lead,
        parts=[table, *figures, _bytes_table(rows, nodes * per_node)],
        circumstances=_circumstances(record),
        findings=_findings(rows),
        note=_NOTE,
    )
    write_page(page, folder / FILE)


def _circumstances(record: Mapping[str, Any]) -> dict[str, str]:
    machine = record["hardware"]
    return {
        "command": record["command"],
        **record["versions"],
        "hardware": f"{machine['platform']}, {machine['cores']} cores shared by all hosts",
        "learning rates": ", ".join(f"{label} {rate}" for label, rate in record["learning_rates"].items()),
    }


def _results_table(rows: Sequence[ComparisonRow]) -> Table:
    classifies = rows[0].top1 is not None
    header = ("recipe", *(["top-1 %"] if classifies else []), "loss", "wire bytes per host", "of ddp", "seconds")
    header += ("of ddp bf16", "utilisation", "compression", "seeds")
    lines = [
        (
            row.label,
            *([_spread(row)] if classifies else []),
            f"{row.loss:.3f}",
            human_bytes(row.wire_bytes),
            f"{100 * row.wire_ratio:.3g} %",
            f"{row.seconds:.1f}",
            f"{row.seconds_ratio:.2f}",
            f"{100 * row.utilisation:.0f} %",
            f"{row.compression:.2f} : 1",
            str(row.seeds),
        )
        for row in rows
    ]
    note = (
        "Top-1 is the mean over seeds ± the standard deviation. Wire bytes are those that a host's interface sent, "
        "start-up and the first comparison of weights included. Seconds are those of the training loop. Utilisation is "
        "the seconds of solo, which sends nothing, over those of the recipe. Grey rows are references; solo's accuracy "
        "is that of one worker alone, with its share of the data."
    )
    return Table("Results", header, tuple(lines), note, _references(rows))


def _bytes_table(rows: Sequence[ComparisonRow], workers: int) -> Table:
    sizes = ("payload of a worker", "if all-reduced in a ring", "start-up", "wire bytes")
    lines = []
    for row in rows:
        rest = row.wire_bytes - row.ring_bytes - row.start_bytes
        counts = map(human_bytes, (row.payload, row.ring_bytes, row.start_bytes, row.wire_bytes))
        ratio = f"{row.wire_bytes / row.payload:.3g}" if row.payload else "-"
        lines.append((row.label, *counts, ratio, f"{'-' if rest < 0 else ''}{human_bytes(abs(rest))}"))
    note = (
        "Payload is what a worker hands to collectives; wire bytes are what leaves the host. They differ for four "
        f"reasons. A ring all-reduce of n workers sends every byte 2 (n - 1) / n times, here "
        f"{2 * (workers - 1) / workers:.3g} times. Start-up costs bytes before training begins, to meet, connect and "
        "compare the first weights; solo sends nothing else. Headers and acknowledgements are added. And not every "
        "collective is a ring all-reduce: all-gathers and broadcasts send other amounts, so that a recipe that sends "
        "little, or in a code of its own, has a rest of either sign."
    )
    header = ("recipe", *sizes, "wire over payload", "the rest")
    return Table("Payload and wire bytes", header, tuple(lines), note, _references(rows))


def _references(rows: Sequence[ComparisonRow]) -> tuple[int, ...]:
    return tuple(i for i, row in enumerate(rows) if row.label in REFERENCES)


def _spread(row: ComparisonRow) -> str:
    return f"{row.top1:.2f}" if row.top1_std is None else f"{row.top1:.2f} ± {row.top1_std:.2f}"


def _findings(rows: Sequence[ComparisonRow]) -> list[str]:
    """Summarizes the table in sentences: which recipe sends least and which takes least time, references aside."""
    others = [row for row in rows if row.label not in REFERENCES]
    by_label = {row.label: row for row in rows}
    if not others:
        return []
    leanest, fastest = min(others, key=lambda row: row.wire_bytes), min(others, key=lambda row: row.seconds)
    ddp, solo = by_label[DDP], by_label[SOLO]
    # On a busy machine solo may be slower than other recipes; then it is no limit.
    limit = f"; without any communication it would be {solo.seconds:.1f} s" if solo.seconds < fastest.seconds else ""
    return [
        f"{leanest.label} sends least: {human_bytes(leanest.wire_bytes)} a host, "
        f"{_times(1 / leanest.wire_ratio)} less than {DDP}{_score_against(leanest, ddp)}.",
        f"{fastest.label} takes least time: {fastest.seconds:.1f} s, {_speed(fastest)}{limit}.",
    ]


def _speed(row: ComparisonRow) -> str:
    """Compares the speed of a contestant with that of ddp in bf16."""
    faster = 1 / row.seconds_ratio
    return f"as fast as {DDP_BF16}" if 0.97 < faster < 1.03 else f"{_times(faster)} the speed of {DDP_BF16}"


def _score_against(row: ComparisonRow, reference: ComparisonRow) -> str:
    if row.top1 is None or reference.top1 is None:
        return f", at a validation loss of {row.loss:.3f} against {reference.loss:.3f}"
    return f", at {row.top1:.2f} % top-1 against {reference.top1:.2f} %"


def _times(ratio: float) -> str:
    """A ratio as text: 0.37x, 4.2x, 430x."""
    return f"{ratio:.3g}x" if ratio < 100 else f"{ratio:.0f}x"
