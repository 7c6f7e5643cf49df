"""Fixtures that several files use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from abtrain.commands.compare import command as compare
from abtrain.commands.compare import comparison as arguments
from abtrain.commands.compare.contestants import Contestant
from abtrain.commands.compare.runs import ComparisonRun
from tests.faults.kept_runs import CONFIG, StandInLab, finish


@pytest.fixture
def task(tmp_path: Path) -> ComparisonRun:
    """A finished run of a comparison."""
    return finish(ComparisonRun(Contestant("ab_outer", CONFIG), 0, 10**8, tmp_path / "runs" / "ab_outer"))


@pytest.fixture
def labs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Lets comparisons run on any system; the names of the folders that were run."""
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(arguments, "system_problems", list)
    monkeypatch.setattr(compare, "Lab", StandInLab)
    StandInLab.ran.clear()
    yield StandInLab.ran
    StandInLab.ran.clear()
