"""The notebook of the first hour runs in a kernel of its own, and the outputs that it holds are those of a run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

from tests.pages import ROOT

NOTEBOOK = ROOT / "docs" / "first_hour.ipynb"


def texts(notebook: Any) -> list[str]:
    """What each cell of code prints. Numbers are left out, since machines compute slightly different ones."""
    outputs = ("".join(output.text for output in cell.outputs) for cell in notebook.cells if cell.cell_type == "code")
    return [re.sub(r"\d+", "0", text) for text in outputs]


def test_the_notebook_runs_and_holds_its_outputs(tmp_path: Path) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    held = texts(notebook)
    NotebookClient(notebook, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    assert texts(notebook) == held
    assert "the same bits: True" in "".join(held)


def test_links_of_the_notebook_lead_to_pages() -> None:
    texts = [cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "markdown"]
    links = re.findall(r"\]\(([^)#]+)", "\n".join(texts))
    assert links and all((NOTEBOOK.parent / link).exists() for link in links), links
