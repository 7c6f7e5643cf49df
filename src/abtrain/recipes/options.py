"""Options of recipes as text. A recipe's signature is the only list of its options: their names, kinds and defaults."""

from __future__ import annotations

import inspect
import sys
import tomllib
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import cache
from types import SimpleNamespace
from typing import Any

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.factoring import Factoring


@cache
def kinds_of(recipe: Callable[..., Any]) -> Mapping[str, Any]:
    """The annotation of each option that a recipe takes, by name, in the order of its signature."""
    parameters = inspect.signature(recipe).parameters
    # From the signature, which a recipe may have from another one: annotations are names in the recipe's module.
    declared = SimpleNamespace(__annotations__={name: one.annotation for name, one in parameters.items()})
    hints = typing.get_type_hints(declared, vars(sys.modules[recipe.__module__]))
    kinds: dict[str, Any] = {}
    for parameter in parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            kinds[parameter.name] = hints[parameter.name]
        elif parameter.kind is parameter.VAR_KEYWORD:
            factoring = typing.get_type_hints(Factoring)
            kinds |= {name: factoring[name] for name in Factoring.__dataclass_fields__ if name != "rank_rule"}
    return kinds


def unknown_options(recipe: str, names: Iterable[str], known: Collection[str]) -> list[str]:
    """The messages for options that a recipe does not have; empty if it has all of them."""
    return [f"recipe {recipe!r} has no option {name!r}: {nearest(name, known)}" for name in names if name not in known]


def read_options(recipe: str, text: str, kinds: Mapping[str, Any]) -> dict[str, Any]:
    """The values of `OPTION=VALUE,OPTION=VALUE`, each of the kind that the recipe's signature declares.

    Items of a list follow each other with commas: `exclude=head.*,embed.*`. Whether a value is in range, the recipe
    says when it is built.

    Args:
        recipe: its name, for messages.
        text: what follows the name and its colon; may be empty.
        kinds: from `kinds_of`.

    Raises:
        ConfigurationError: an unknown option, an option without a value or with two, a value of another kind; all of
            them at once.
    """
    found: dict[str, str] = {}
    problems: list[str] = []
    last = ""
    for piece in text.split(",") if text else ():
        name, equals, value = piece.partition("=")
        name = name.strip().replace("-", "_")
        if not equals and _is_list(kinds.get(last)):
            found[last] += f",{piece}"
        elif not equals:
            problems.append(f"recipe {recipe!r}: {piece!r} has no value: use OPTION=VALUE, such as ddp:wire=bf16")
        elif name in found:
            problems.append(f"recipe {recipe!r}: option {name!r} is given twice: leave one out")
        else:
            found[name], last = value.strip(), name
    problems += unknown_options(recipe, found, kinds)
    values = {}
    for name in [name for name in found if name in kinds]:
        try:
            values[name] = _value(found[name], kinds[name])
        except ValueError as error:
            problems.append(f"recipe {recipe!r}: {name}={found[name]!r} is {error}")
    if problems:
        raise ConfigurationError(problems)
    return values


def written(value: Any) -> str:
    """A value as `read_options` reads it back."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return ",".join(map(str, value))
    return str(value)


def _value(text: str, kind: Any) -> Any:
    """
    Raises:
        ValueError: a text of another kind, with what is wrong and a remedy.
    """
    kinds = (kind, *typing.get_args(kind))
    if _is_list(kind):
        return _items(text)
    if bool in kinds:
        return _read(text, lambda text: {"true": True, "false": False}[text.lower()], "neither true nor false")
    if int in kinds:
        return _read(text, int, "not a whole number")
    if float in kinds:
        return _read(text, float, "not a number")
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _read(text: str, reader: Callable[[str], Any], wrong: str) -> Any:
    try:
        return reader(text)
    except (ValueError, KeyError):
        raise ValueError(f"{wrong}: use one") from None


def _is_list(kind: Any) -> bool:
    return typing.get_origin(kind) is tuple


def _items(text: str) -> tuple[str, ...]:
    """The items of `a,b`, or of a list as TOML has it: `["a", "b"]`."""
    try:
        items = tomllib.loads(f"items = {text}")["items"]
    except (tomllib.TOMLDecodeError, RecursionError):
        items = None
    if isinstance(items, list) and all(isinstance(item, str) for item in items):
        return tuple(items)
    return tuple(item.strip() for item in text.split(",") if item.strip())
