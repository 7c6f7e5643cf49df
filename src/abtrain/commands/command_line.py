"""Parses the command lines of all commands, and prints their help in one style."""

from __future__ import annotations

import argparse
import ast
import difflib
import inspect
import itertools
import textwrap
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, Field, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, Union

from abtrain import recipes
from abtrain.errors import ConfigurationError

Settings = TypeVar("Settings")
_HELP_COLUMN = 26


@dataclass(frozen=True)
class Shown:
    """Sets how a field of a command's settings appears on the command line. Used in the field's `Annotated` type.

    Attributes:
        help: the help text of the option; by default the docstring of the field.
        name: the name of the option; by default that of the field.
        group: the heading of a group of options that begins with this field; empty to continue the former group.
        positional: whether the field is a positional argument instead of an option.
    """

    help: str = ""
    name: str = ""
    group: str = ""
    positional: bool = False


class Parser(argparse.ArgumentParser):
    """Parses the arguments of a command, and raises ConfigurationError if they are invalid.

    Args:
        command: the name of the command.
        usage: the usage line after the name of the command, such as `RUN [OPTIONS]`.
        about: the purpose of the command, which the help shows above the options.
        examples: the text that the help shows below the options. Indented lines keep their line breaks.
    """

    def __init__(self, command: str, usage: str, about: str, examples: str = "") -> None:
        super().__init__(
            prog=f"abtrain {command}",
            usage=f"%(prog)s {usage}",
            description=about,
            epilog=examples,
            formatter_class=_Formatter,
            allow_abbrev=False,
        )

    def read(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parses the arguments of the command, and returns their values by name.

        Raises:
            ConfigurationError: an argument is unknown, missing or malformed.
            SystemExit: --help is among the arguments.
        """
        given, unknown = self.parse_known_args(arguments)
        if unknown:
            options = [word.partition("=")[0] for word in unknown if word.startswith("-")]
            raise ConfigurationError(
                [self._hint(option) for option in options]
                or f"unexpected argument {unknown[0]!r}: `{self.prog} --help` lists the arguments"
            )
        return given

    def error(self, message: str) -> NoReturn:
        """Raises ConfigurationError. The method that this one replaces would print the usage and exit."""
        raise ConfigurationError(f"{message.removeprefix('argument ')} (see `{self.prog} --help`)")

    def _hint(self, option: str) -> str:
        name = option.lstrip("-").replace("-", "_")
        if any(name in recipes.options_of(recipe) for recipe in recipes.RECIPES):
            return f"{option} is an option of recipes: write it after the recipe's name, as in RECIPE:{name}=VALUE"
        close = difflib.get_close_matches(option, self._option_string_actions, n=1)
        remedy = f"did you mean {close[0]}?" if close else f"`{self.prog} --help` lists the options"
        return f"unknown option {option}: {remedy}"


class _Formatter(argparse.HelpFormatter):
    """Wraps the help of options without breaking it at hyphens, and keeps the line breaks of indented examples."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=_HELP_COLUMN)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        blocks = itertools.groupby(text.splitlines(), lambda line: not line or line.startswith(" "))
        return "\n".join("\n".join(lines) if kept else textwrap.fill(" ".join(lines), width) for kept, lines in blocks)


def parse(
    kind: type[Settings], command: str, arguments: Sequence[str], before: Settings | None = None, examples: str = ""
) -> Settings:
    """Returns the settings of a command from its arguments.

    Args:
        kind: a dataclass. Its docstring describes the command; the docstrings of its fields describe the options.
        command: the name of the command.
        arguments: the arguments of the command.
        before: the values of settings that the arguments do not set; by default the defaults of the dataclass.
        examples: the text that the help shows below the options.

    Raises:
        ConfigurationError: an argument is unknown, missing or malformed.
        SystemExit: --help is among the arguments.
    """
    hints, meanings = typing.get_type_hints(kind, include_extras=True), _docstrings(kind)
    shown = {field.name: _shown(hints[field.name]) for field in fields(kind)}  # type: ignore[arg-type]
    places = [_place(field) for field in fields(kind) if shown[field.name].positional]  # type: ignore[arg-type]
    parser = Parser(command, " ".join((*places, "[OPTIONS]")), inspect.getdoc(kind) or "", examples)
    group: argparse._ActionsContainer = parser
    for field in fields(kind):  # type: ignore[arg-type]
        about = shown[field.name]
        if about.group:
            group = parser.add_argument_group(about.group)
        default = field.default if before is None else getattr(before, field.name)
        meaning = (about.help or meanings[field.name]).rstrip(".").replace("%", "%%")
        if default not in (None, MISSING, ()) and not isinstance(default, bool):
            meaning += f" (default {default})"
        _add(parser if about.positional else group, field, about, hints[field.name], meaning)
    given = {name: value for name, value in vars(parser.read(arguments)).items() if value is not MISSING}
    return kind(**given) if before is None else replace(before, **given)  # type: ignore[type-var]


def _add(group: Any, field: Field[Any], about: Shown, hint: Any, meaning: str) -> None:
    """Adds an argument for a field to a group of arguments. Without the argument, the field keeps its default."""
    kind = _without_none(hint)
    common: dict[str, Any] = {"default": argparse.SUPPRESS, "help": meaning}
    name = "--" + (about.name or field.name).replace("_", "-")
    if kind is bool:
        on: Any = argparse.BooleanOptionalAction if field.default else "store_true"
        group.add_argument(name, dest=field.name, action=on, **common)
        if not field.default:
            # Turns off a setting that the file of --config turns on.
            off = name.replace("--", "--no-", 1)
            group.add_argument(off, dest=field.name, action="store_false", **{**common, "help": argparse.SUPPRESS})
    elif about.positional:
        nargs = None if field.default is MISSING else "?"
        common["default"] = MISSING  # argparse would convert SUPPRESS, a string, to the type
        group.add_argument(field.name, metavar=field.name.upper(), nargs=nargs, type=kind, **common)
    elif typing.get_origin(kind) is Literal:
        group.add_argument(name, dest=field.name, choices=typing.get_args(kind), **common)
    elif typing.get_origin(kind) is tuple:
        group.add_argument(name, dest=field.name, metavar="NAME", nargs="*", action=_AsTuple, **common)
    else:
        read = {int: whole_number, float: number}.get(kind, kind)
        metavar = {int: "N", float: "X", Path: "PATH"}.get(kind, field.name.rpartition("_")[2].upper())
        group.add_argument(name, dest=field.name, metavar=metavar, type=read, **common)


class _AsTuple(argparse.Action):
    """Stores several values as a tuple."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        setattr(namespace, self.dest, tuple(values))


def _shown(hint: Any) -> Shown:
    found = [each for each in getattr(hint, "__metadata__", ()) if isinstance(each, Shown)]
    return found[0] if found else Shown()


def _place(field: Field[Any]) -> str:
    name = field.name.upper()
    return name if field.default is MISSING else f"[{name}]"


def _without_none(hint: Any) -> Any:
    """Returns the type of a field without its annotations, and without None as an alternative."""
    kind = hint.__origin__ if hasattr(hint, "__metadata__") else hint
    if typing.get_origin(kind) in (Union, types.UnionType):
        (kind,) = (each for each in typing.get_args(kind) if each is not types.NoneType)
    return kind


def _docstrings(kind: type) -> dict[str, str]:
    """Returns the docstrings of a dataclass's fields by name, including fields of its base classes."""
    found = {}
    for each in kind.__mro__[:-1]:
        (node,) = ast.parse(textwrap.dedent(inspect.getsource(each))).body
        assert isinstance(node, ast.ClassDef)
        for field, text in itertools.pairwise(node.body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found[ast.unparse(field.target)] = " ".join(str(text.value.value).split())
    return found


def whole_number(text: str) -> int:
    """Converts an argument to an integer. Raises ArgumentTypeError, which argparse reports, if it is none."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def number(text: str) -> float:
    """Converts an argument to a number. Raises ArgumentTypeError, which argparse reports, if it is none."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number: write one such as 0.5 or 25e6") from None
