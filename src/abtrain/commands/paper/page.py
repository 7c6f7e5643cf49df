"""The HTML page of an experiment, a study or the search."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from abtrain.commands.circumstances import versions
from abtrain.commands.figures import Figure
from abtrain.commands.page import Page, Table, write_page

_LEAD = "Experiments of AB-training (Coquelin et al., arXiv 2405.01067). All numbers are from runs in this folder."


def write_paper_page(name: str, title: str, parts: Sequence[Table | Figure], folder: Path, command: str) -> Path:
    """Writes NAME.html into the folder of the experiments; returns its path."""
    path = folder / f"{name}.html"
    write_page(Page(title, _LEAD, parts, {"command": command, **versions()}), path)
    return path
