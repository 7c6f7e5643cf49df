"""Fixtures that several files use."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from abtrain.commands.compare import command as compare
from abtrain.commands.compare import comparison as arguments
from abtrain.commands.compare.contestants import Contestant
from abtrain.commands.compare.runs import ComparisonRun
from tests.faults.kept_runs import CONFIG, StandInLab, compared, finish


@pytest.fixture
def task(tmp_path: Path) -> ComparisonRun:
    """A finished run of a comparison."""
    return finish(ComparisonRun(Contestant("ab_outer", CONFIG), 0, 10**8, tmp_path / "runs" / "ab_outer"))


@contextlib.contextmanager
def stand_in_labs() -> Iterator[list[str]]:
    """Lets comparisons run on any system; the names of the folders that were run."""
    pytest.importorskip("matplotlib")
    StandInLab.ran.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments, "system_problems", list)
        patch.setattr(compare, "Lab", StandInLab)
        yield StandInLab.ran
    StandInLab.ran.clear()


@pytest.fixture
def labs() -> Iterator[list[str]]:
    with stand_in_labs() as ran:
        yield ran


@pytest.fixture(scope="session")
def _finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    with stand_in_labs():
        assert compared(folder) == 0
    return folder


@pytest.fixture
def finished(_finished: Path, tmp_path: Path, labs: list[str]) -> Path:
    """The folder of a finished comparison; figures take a second to draw, so it is a copy."""
    return shutil.copytree(_finished, tmp_path / "finished")
