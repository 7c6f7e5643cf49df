"""Writes the report of a comparison: one HTML page with findings, tables and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abtrain.commands.compare.contestants import DDP, DDP_BF16, REFERENCES, SOLO
from abtrain.commands.compare.summary import ComparisonRow
from abtrain.commands.figures import Figure
from abtrain.commands.output import breakable
from abtrain.commands.page import Page, Table, remarked, write_page
from abtrain.commands.units import human_bytes, spread

FILE = "report.html"
_NOTE = (
    "The hosts are emulated on one machine. Token buckets shape their links, without added delay. Runs took place one "
    "after the other, so their seconds include other load on the machine: a utilisation above 100 % means that the "
    "machine was busier while solo ran. All numbers are in compare.json. The settings, metrics and interface counters "
    "of each run are in runs/."
)


def write_report(
    record: Mapping[str, Any], rows: Sequence[ComparisonRow], figures: Sequence[Figure], folder: Path
) -> None:
    """Writes report.html into the folder of the comparison. The folder already contains the files of the figures.

    Args:
        record: the content of compare.json.
        rows: the rows of the table.
        figures: the figures of the report.
        folder: the folder of the comparison.
    """
    settings = record["settings"]
    nodes, per_node, steps = settings["nodes"], settings["workers_per_node"], settings["steps"]
    lead = (
        f"{nodes} hosts with {per_node} worker{'s' if per_node > 1 else ''} each, links of {record['link']}, "
        f"{steps:,} steps. All recipes have the same steps, seeds and order of the data."
    )
    (table,) = remarked([_results_table(rows)], record["note"])
    page = Page(
        title=f"{settings['task']}: recipes compared",
        lead=lead,
        parts=[table, *figures, _bytes_table(rows, nodes * per_node)],
        circumstances=_circumstances(record),
        findings=findings(rows),
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
            breakable(row.label),
            *([] if row.top1 is None else [spread(row.top1, row.top1_std)]),
            "-" if row.loss is None else f"{row.loss:.3f}",
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
        "Top-1 is the mean over seeds ± the standard deviation. Wire bytes are the bytes that a host's interface sent, "
        "including start-up and the first comparison of weights. Seconds are those of the training loop. Utilisation "
        "is the seconds of solo, which does not communicate, over those of the recipe. Grey rows are references. The "
        "accuracy of solo is that of one worker on its share of the data."
    )
    if any(row.loss is None for row in rows):
        note += " A loss of - is NaN or infinite."
    return Table("Results", header, tuple(lines), note, _references(rows))


def _bytes_table(rows: Sequence[ComparisonRow], workers: int) -> Table:
    sizes = ("payload of a worker", "as ring all-reduce", "start-up", "wire bytes")
    lines = []
    for row in rows:
        rest = row.wire_bytes - row.ring_bytes - row.start_bytes
        counts = map(human_bytes, (row.payload, row.ring_bytes, row.start_bytes, row.wire_bytes))
        ratio = f"{row.wire_bytes / row.payload:.3g}" if row.payload else "-"
        lines.append((breakable(row.label), *counts, ratio, f"{'-' if rest < 0 else ''}{human_bytes(abs(rest))}"))
    note = (
        "Payload is the data that a worker hands to collectives. Wire bytes are the bytes that leave the host. They "
        "differ for four reasons. A ring all-reduce of n workers sends every byte 2 (n - 1) / n times, here "
        f"{2 * (workers - 1) / workers:.3g} times. Before training, workers connect and compare the initial "
        "weights; solo sends only these start-up bytes. The network adds headers and acknowledgements. Not every "
        "collective is a ring all-reduce: all-gathers and broadcasts send other amounts, so the remainder can be "
        "negative for recipes that send little, or in few bits."
    )
    header = ("recipe", *sizes, "wire over payload", "remainder")
    return Table("Payload and wire bytes", header, tuple(lines), note, _references(rows))


def _references(rows: Sequence[ComparisonRow]) -> tuple[int, ...]:
    return tuple(i for i, row in enumerate(rows) if row.label in REFERENCES)


def findings(rows: Sequence[ComparisonRow]) -> list[str]:
    """Returns a text about the recipe that sends the fewest bytes, and one about the fastest recipe.

    Each text states what the recipe saves, and how much accuracy it loses. Reference recipes are excluded.
    """
    others = [row for row in rows if row.label not in REFERENCES]
    by_label = {row.label: row for row in rows}
    if not others:
        return []
    leanest, fastest = min(others, key=lambda row: row.wire_bytes), min(others, key=lambda row: row.seconds)
    ddp, solo = by_label[DDP], by_label[SOLO]
    # On a busy machine solo may be slower than other recipes. Its time is then no lower limit.
    limit = f"; without communication it would take {solo.seconds:.1f} s" if solo.seconds < fastest.seconds else ""
    return [
        f"{leanest.label} sends the least: {human_bytes(leanest.wire_bytes)} per host, "
        f"{_share(leanest.wire_ratio)} of {DDP}'s. {_lost(leanest, ddp)}",
        f"{fastest.label} takes the least time: {fastest.seconds:.1f} s, {_speed(fastest)}{limit}. "
        f"{_lost(fastest, ddp)}",
    ]


def _share(ratio: float) -> str:
    return f"{ratio:.0%}" if ratio > 0.5 else f"1/{1 / ratio:,.3g}"


def _speed(row: ComparisonRow) -> str:
    """Returns a phrase that compares the speed of a recipe with that of ddp in bf16."""
    faster = 1 / row.seconds_ratio
    return f"as fast as {DDP_BF16}" if 0.97 < faster < 1.03 else f"{faster:.3g} times as fast as {DDP_BF16}"


def _lost(row: ComparisonRow, ddp: ComparisonRow) -> str:
    """Returns a sentence about the accuracy that a recipe loses or gains compared with ddp."""
    if row.top1 is None or ddp.top1 is None:
        if row.loss is None:
            return "Its validation loss is NaN or infinite."
        if ddp.loss is None:
            return f"{DDP}'s validation loss is NaN or infinite."
        more = row.loss - ddp.loss
        change = f"{abs(more):.3f} {'higher' if more > 0 else 'lower'} than {DDP}'s"
        return f"Its validation loss is {change}: {row.loss:.3f} instead of {ddp.loss:.3f}."
    lost = ddp.top1 - row.top1
    verb = "loses" if lost > 0 else "gains"
    scores = f"{row.top1:.2f} % instead of {ddp.top1:.2f} %"
    return f"It {verb} {abs(lost):.2f} points of top-1: {scores}." if abs(lost) >= 0.005 else "It loses no top-1."
