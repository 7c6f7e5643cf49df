"""The report of a comparison: one HTML file that needs nothing else, no network and no script."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from abtrain.commands.compare.contestants import DDP, DDP_BF16, SOLO
from abtrain.commands.compare.plots import Figure
from abtrain.commands.compare.summary import ComparisonRow
from abtrain.commands.units import human_bytes
from abtrain.files import write_whole

FILE = "report.html"
_TEMPLATE = "report.html.j2"


def write_report(
    record: Mapping[str, Any], rows: Sequence[ComparisonRow], figures: Sequence[Figure], folder: Path
) -> None:
    """Writes report.html.

    Args:
        record: the content of compare.json.
        rows: of the table.
        figures: that lie in the folder.
        folder: of the comparison.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(size=human_bytes, times=_times)
    template = environment.from_string(resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    images = {figure.file: base64.b64encode((folder / figure.file).read_bytes()).decode() for figure in figures}
    page = template.render(
        record=record,
        rows=rows,
        figures=figures,
        images=images,
        references=(SOLO, DDP, DDP_BF16),
        findings=_findings(rows),
        workers=record["settings"]["nodes"] * record["settings"]["workers_per_node"],
    )
    write_whole(folder / FILE, page)


def _findings(rows: Sequence[ComparisonRow]) -> list[str]:
    """Summarizes the table in sentences: the fewest bytes and the shortest time, references aside."""
    others = [row for row in rows if row.label not in (SOLO, DDP, DDP_BF16)]
    by_label = {row.label: row for row in rows}
    if not others:
        return []
    leanest, fastest = min(others, key=lambda row: row.wire_bytes), min(others, key=lambda row: row.seconds)
    ddp, solo = by_label[DDP], by_label[SOLO]
    # On a busy machine solo may come out slower than others; it is no limit then.
    limit = f"; without any communication it would be {solo.seconds:.1f} s" if solo.seconds < fastest.seconds else ""
    return [
        f"{leanest.label} sends least: {human_bytes(leanest.wire_bytes)} a host, "
        f"{_times(1 / leanest.wire_ratio)} less than {DDP}{_score_against(leanest, ddp)}.",
        f"{fastest.label} takes least time: {fastest.seconds:.1f} s, {_speed(fastest)}{limit}.",
    ]


def _speed(row: ComparisonRow) -> str:
    """How fast a contestant is beside ddp in bf16."""
    faster = 1 / row.seconds_ratio
    return f"as fast as {DDP_BF16}" if 0.97 < faster < 1.03 else f"{_times(faster)} the speed of {DDP_BF16}"


def _score_against(row: ComparisonRow, reference: ComparisonRow) -> str:
    if row.top1 is None or reference.top1 is None:
        return f", at a validation loss of {row.loss:.3f} against {reference.loss:.3f}"
    return f", at {row.top1:.2f} % top-1 against {reference.top1:.2f} %"


def _times(ratio: float) -> str:
    """A ratio as people say it: 0.37x, 4.2x, 430x."""
    return f"{ratio:.3g}x" if ratio < 100 else f"{ratio:.0f}x"
