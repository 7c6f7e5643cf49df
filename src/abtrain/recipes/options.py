"""Reads and writes options of recipes as strings. The signature of a recipe declares its options."""

from __future__ import annotations

import inspect
import tomllib
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import fields
from functools import cache, wraps
from typing import Any, NamedTuple, ParamSpec, TypeVar, get_args, get_origin, get_type_hints

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.factoring import Factoring

_P = ParamSpec("_P")
_T = TypeVar("_T")

OTHER_NAMES = {
    **dict.fromkeys(("sync_every", "sync_steps", "local_sgd_steps", "period"), "every"),
    **dict.fromkeys(("num_fragments", "model_fragments"), "fragments"),
    "fragment_sync_delay": "delay",
    "outer_optimizer": "outer_lr",
    "should_quantize": "wire",
}
"""Options of torchft, torchtitan, Accelerate and PyTorch, with the options that replace them."""


class Option(NamedTuple):
    """Describes an option of a recipe: `kind` is the type of its values, `meaning` its description for users."""

    kind: Any
    meaning: str


@cache
def declared_options(recipe: Callable[..., Any]) -> Mapping[str, Option]:
    """Returns the options that a recipe takes, by name, in the order of its signature.

    A signature declares an option as `name: Annotated[kind, "Meaning."] = default`. `**factoring` stands for the fields
    of `Factoring`, which are declared in the same way.
    """
    parameters = inspect.signature(recipe).parameters
    hints = get_type_hints(recipe, include_extras=True)
    names = [name for name, one in parameters.items() if one.kind is one.KEYWORD_ONLY]
    if any(one.kind is one.VAR_KEYWORD for one in parameters.values()):
        hints = get_type_hints(Factoring, include_extras=True) | hints
        names += [field.name for field in fields(Factoring) if field.name not in names]
    return {name: Option(hints[name].__origin__, hints[name].__metadata__[0]) for name in names}


def unknown_options(recipe: str, names: Iterable[str], known: Collection[str]) -> list[str]:
    """Returns one message for each option that a recipe does not have, with the name of the nearest that it has."""
    unknown = {name: nearest(OTHER_NAMES.get(name, name), known) for name in names if name not in known}
    return [f"recipe {recipe!r} has no option {name!r}: {hint}" for name, hint in unknown.items()]


def only_declared(recipe: Callable[_P, _T]) -> Callable[_P, _T]:
    """Makes a recipe function raise ConfigurationError for an option that it does not have."""

    @wraps(recipe)
    def build(*args: _P.args, **options: _P.kwargs) -> _T:
        given = [name for name in options if name not in ("total_steps", "name")]
        unknown = unknown_options(recipe.__name__, given, declared_options(recipe))
        if unknown:
            raise ConfigurationError(unknown)
        return recipe(*args, **options)

    return build


def read_options(recipe: str, text: str, known: Mapping[str, Option]) -> dict[str, Any]:
    """Reads the string `OPTION=VALUE,OPTION=VALUE`, and returns values by option, converted to the option's type.

    Commas also separate the items of a list: `exclude=head.*,embed.*`. Ranges are checked when the recipe is built.

    Raises:
        ConfigurationError: options are unknown, have no value, are given twice, or have a value of the wrong type.
    """
    found: dict[str, str] = {}
    problems: list[str] = []
    last = ""
    for piece in text.split(",") if text else ():
        name, equals, value = piece.partition("=")
        name = name.strip().replace("-", "_")
        if not equals and last in known and _is_list(known[last]):
            found[last] += f",{piece}"
        elif not equals:
            problems.append(f"recipe {recipe!r}: {piece!r} has no value: use OPTION=VALUE, such as ddp:wire=bf16")
        elif name in found:
            problems.append(f"recipe {recipe!r}: option {name!r} is given twice: leave one out")
        else:
            found[name], last = value.strip(), name
    problems += unknown_options(recipe, found, known)
    values = {}
    for name in [name for name in found if name in known]:
        try:
            values[name] = _value(found[name], known[name])
        except ValueError as error:
            problems.append(f"recipe {recipe!r}: {name}={found[name]!r} is {error}")
    if problems:
        raise ConfigurationError(problems)
    return values


def written(value: Any) -> str:
    """Returns a boolean, number, string, or tuple of strings as a string that `read_options` reads."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, tuple | list) else str(value)


_READERS: Mapping[type, tuple[Callable[[str], Any], str]] = {
    bool: (lambda text: {"true": True, "false": False}[text.lower()], "neither true nor false"),
    int: (int, "not a whole number"),
    float: (float, "not a number"),
}
"""For each type, the function that reads a value, and the message if that function raises an error."""


def _value(text: str, option: Option) -> Any:
    """Converts a string to the type of its option.

    Raises:
        ValueError: the string does not have this type. The message completes "NAME=TEXT is ...".
    """
    if _is_list(option):
        return _items(text)
    for kind in _READERS.keys() & {option.kind, *get_args(option.kind)}:
        read, wrong = _READERS[kind]
        try:
            return read(text)
        except (ValueError, KeyError):
            raise ValueError(f"{wrong}: use one") from None
    return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "\"'" else text


def _is_list(option: Option) -> bool:
    return get_origin(option.kind) is tuple


def _items(text: str) -> tuple[str, ...]:
    """Returns the items of a string such as `a,b`, or of a list in TOML such as `["a", "b"]`."""
    with suppress(tomllib.TOMLDecodeError, RecursionError):
        items = tomllib.loads(f"items = {text}")["items"]
        if isinstance(items, list) and all(isinstance(item, str) for item in items):
            return tuple(items)
    return tuple(item.strip() for item in text.split(",") if item.strip())
