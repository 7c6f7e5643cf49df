"""Tables and figures of an experiment, in one self-contained HTML page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from abtrain.commands.circumstances import versions
from abtrain.commands.compare.plots import Figure
from abtrain.commands.paper.tables import Table
from abtrain.files import write_whole

_TEMPLATE = "page.html.j2"
_LEAD = "AB-training (Coquelin et al., arXiv 2405.01067), run again. Every number here is of runs in this folder."


def write_page(
    name: str, title: str, tables: Sequence[Table], figures: Sequence[Figure], folder: Path, command: str
) -> Path:
    """Writes NAME.html.

    Args:
        name: of the experiment.
        title: of the page.
        tables: that it shows.
        figures: that lie in the folder.
        folder: of the experiments.
        command: that made it.
    """
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    images = {figure.file: base64.b64encode((folder / figure.file).read_bytes()).decode() for figure in figures}
    page = folder / f"{name}.html"
    text = template.render(
        title=title, lead=_LEAD, tables=tables, figures=figures, images=images, command=command, versions=versions()
    )
    write_whole(page, text)
    return page
