"""Writes tables and figures as one HTML page that needs no network, no script and no other file."""

from __future__ import annotations

import base64
import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

from abtrain.commands.figures import Figure
from abtrain.commands.files import write_whole

_TEMPLATE = "page.html.j2"
_NEEDED = ("matplotlib", "jinja2")
_LONGEST_NUMBER = 15
"""The maximum number of characters after the first digit in a cell with a number, its deviation and its unit."""


@dataclass(frozen=True)
class Table:
    """A table on an HTML page, with strings as cells.

    Attributes:
        title: the title of the table.
        header: the names of the columns.
        lines: the rows, each with one cell per column.
        note: an explanation of the numbers.
        muted: the indexes of rows that are printed in grey.
    """

    title: str
    header: tuple[str, ...]
    lines: tuple[tuple[str, ...], ...]
    note: str
    muted: tuple[int, ...] = ()


@dataclass(frozen=True)
class Page:
    """The content of a page.

    Attributes:
        title: the title of the page.
        lead: the sentence below the title.
        parts: the tables and figures, from top to bottom.
        circumstances: how the results came about, such as the command and the versions, by name.
        findings: sentences that summarize the results.
        note: a note at the end of the page.
    """

    title: str
    lead: str
    parts: Sequence[Table | Figure]
    circumstances: Mapping[str, str]
    findings: Sequence[str] = ()
    note: str = ""


def write_page(page: Page, path: Path) -> None:
    """Writes a page as an HTML file. The PNG files of its figures must be in the same folder."""
    from jinja2 import Environment, StrictUndefined

    def png(figure: Figure) -> str:
        return base64.b64encode((path.parent / figure.file).read_bytes()).decode()

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.tests["table"] = lambda part: isinstance(part, Table)
    environment.filters.update(png=png, kinds=kinds)
    template = environment.from_string(resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    write_whole(path, template.render(page=page))


def remarked(tables: Sequence[Table], remark: str) -> list[Table]:
    """Returns copies of the tables, with `remark` added to the end of each note."""
    return [replace(table, note=f"{table.note} {remark}".strip()) for table in tables]


def missing_packages() -> list[str]:
    """Returns a list with one message that names the missing packages for reports; empty if all are installed."""
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    return [f"the report needs {' and '.join(missing)}: pip install 'abtrain[report]'"] if missing else []


def kinds(table: Table) -> list[str]:
    """Returns the kind of each column: `number`, which is aligned right and not wrapped, or `text`."""
    columns = zip(*table.lines, strict=True) if table.lines else [()] * len(table.header)
    number = re.compile(rf"(?:[-+]?[0-9]|-$).{{,{_LONGEST_NUMBER}}}")
    return ["number" if all(number.fullmatch(cell) for cell in column) else "text" for column in columns]
