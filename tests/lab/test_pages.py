"""The program on the page about the lab runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.pages import ROOT, blocks

pytestmark = pytest.mark.alone


def test_the_page_about_the_lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.py").write_text("print('trained')\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    (program,) = blocks(ROOT / "docs" / "lab.md", "python")
    exec(compile(program.replace("nodes=4", "nodes=2"), "lab.md", "exec"), {})
    assert len(json.loads((tmp_path / "out" / "lab.json").read_text())["hosts"]) == 2
