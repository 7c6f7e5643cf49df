"""Every planned run is run once, whatever stops the others."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from abtrain.commands.runs.folder_run import held, run_once
from abtrain.errors import ConfigurationError


class Named:
    """A run that is done as soon as its name is recorded."""

    def __init__(self, name: str, recorded: list[str]) -> None:
        self._name, self._recorded = name, recorded

    def __str__(self) -> str:
        return self._name

    @property
    def done(self) -> bool:
        return self._name in self._recorded


@pytest.fixture
def recorded() -> list[str]:
    return []


def all_once(names: str, recorded: list[str], fails: str = "") -> list[str]:
    """Runs each name once; returns what was printed."""
    said: list[str] = []

    @contextlib.contextmanager
    def runner() -> Iterator[Callable[[Named], None]]:
        said.append("set up")

        def run_one(run: Named) -> None:
            if str(run) == fails:
                raise RuntimeError(fails)
            recorded.append(str(run))

        yield run_one

    run_once([Named(name, recorded) for name in names], runner(), said.append, lambda run: f"loss of {run}")
    return said


def test_what_is_done_is_not_repeated(recorded: list[str]) -> None:
    recorded.append("b")
    said = all_once("abc", recorded)
    assert recorded == ["b", "a", "c"]
    assert said == ["3 runs, 1 of them already finished", "set up", "1/2 a: loss of a", "2/2 c: loss of c"]


def test_nothing_is_set_up_if_nothing_is_missing(recorded: list[str]) -> None:
    recorded += "ab"
    assert all_once("ab", recorded) == ["2 runs, 2 of them already finished"]


def test_runs_before_a_failure_stay_done(recorded: list[str]) -> None:
    with pytest.raises(RuntimeError):
        all_once("abc", recorded, fails="b")
    assert all_once("abc", recorded)[0] == "3 runs, 1 of them already finished"
    assert recorded == ["a", "b", "c"]


def test_a_folder_of_runs_belongs_to_one_process_at_a_time(tmp_path: Path) -> None:
    with held(tmp_path), pytest.raises(ConfigurationError, match="in use by another process"), held(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigurationError, match="nowhere cannot be written"), held(tmp_path / "nowhere"):
        pass
