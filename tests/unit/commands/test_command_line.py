"""Command lines from dataclasses: values, defaults, errors and help."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

import pytest

from abtrain.commands.command_line import Shown, parse
from abtrain.commands.plan.settings import PlanConfig, RecipesConfig
from abtrain.commands.train.config import TrainConfig
from abtrain.errors import ConfigurationError


@dataclass(frozen=True)
class Base:
    """Settings in common."""

    size: float | None = None
    """Size of it."""


@dataclass(frozen=True)
class Example(Base):
    """Do something with a file."""

    file: Annotated[Path | None, Shown(positional=True)] = None
    """File to take; 5 % of it are read."""
    kind: Annotated[Literal["a", "b"], Shown(name="as")] = "a"
    """Kind of output."""
    steps: Annotated[int | None, Shown(group="how")] = None
    """Number of steps."""
    fast: bool = False
    """Do it fast."""
    safe: bool = True
    """Do it safely."""
    names: tuple[str, ...] = ()
    """Names of things."""


def parsed(*arguments: str, before: Example | None = None) -> Example:
    return parse(Example, "example", arguments, before)


def test_values() -> None:
    given = ("x.txt", "--as", "b", "--steps=3", "--fast", "--no-safe", "--names", "p", "q", "--size", "25e6")
    assert parsed(*given) == Example(25e6, Path("x.txt"), "b", 3, True, False, ("p", "q"))
    assert parsed() == Example()


def test_the_arguments_change_settings_that_were_given_before() -> None:
    before = Example(steps=7, fast=True)
    assert parsed("--no-fast", "--size", "2", before=before) == Example(2.0, steps=7)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stepps", "3"), "unknown option --stepps: did you mean --steps?"),
        (("--every=40",), "--every is an option of recipes: write it after the recipe's name, as in RECIPE:every="),
        (("--steps", "many"), "--steps: 'many' is not a whole number"),
        (("--size", "350M"), "--size: '350M' is not a number"),
        (("--as", "c"), "--as: invalid choice: 'c'"),
        (("a", "b"), "unexpected argument 'b'"),
        (("--steps",), "--steps: expected one argument"),
    ],
)
def test_errors(arguments: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigurationError) as told:
        parsed(*arguments)
    assert told.value.problems[0].startswith(message)


def test_help(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parsed("--help")
    text = capsys.readouterr().out
    assert text.startswith("usage: abtrain example [FILE] [OPTIONS]\n\nDo something with a file.\n")
    assert "5 % of it are read" in text and "\nhow:\n" in text and "--size X" in text and "(default a)" in text
    assert "--no-safe" in text and "--no-fast" not in text and "None" not in text


@pytest.mark.parametrize("kind", [TrainConfig, PlanConfig, RecipesConfig])
def test_every_option_has_a_group_and_a_meaning(
    kind: type, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse(kind, "command", ["--help"])
    head, _, grouped = capsys.readouterr().out.partition("-h, --help")
    for field in fields(kind):
        option = f"--{field.name.replace('_', '-')}"
        assert option in grouped or field.name.upper() in head
