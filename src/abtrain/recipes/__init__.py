"""The named recipes, and how a text names one with its options: data only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.ab_outer import ab_local, ab_outer
from abtrain.recipes.full_rank import ddp, diloco, local_sgd, powersgd, solo
from abtrain.recipes.options import Option, declared_options, read_options, unknown_options, written
from abtrain.recipes.paper import ab, ab_no_groups
from abtrain.recipes.recipe import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    recipe.__name__: recipe for recipe in (ab, ab_local, ab_no_groups, ab_outer, ddp, diloco, local_sgd, powersgd, solo)
}
DEFAULT = "ab_outer"


def options_of(name: str) -> Mapping[str, Option]:
    """The options that a recipe takes, by name, in the order of its signature.

    Raises:
        ConfigurationError: no recipe has this name.
    """
    if name not in RECIPES:
        raise ConfigurationError(f"unknown recipe {name!r}: {nearest(name, RECIPES)}")
    return declared_options(RECIPES[name])


def build(name: str, total_steps: int, /, **options: Any) -> Recipe:
    """The recipe called `name`.

    Raises:
        ConfigurationError: an unknown name; or lists unknown options; or lists values out of range.
    """
    unknown = unknown_options(name, options, options_of(name))
    if unknown:
        raise ConfigurationError(unknown)
    return RECIPES[name](total_steps, **options)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE, such as `ab_outer:every=40,wire=int4`.

    Raises:
        ConfigurationError: an unknown recipe, or all problems of the options (see `read_options`).
    """
    name, _, options = text.partition(":")
    return name, read_options(name, options, options_of(name))


def from_text(text: str, total_steps: int) -> Recipe:
    """The recipe that a text names, with its options.

    Raises:
        ConfigurationError: as for `parse` and `build`; messages about values start with the text.
    """
    name, options = parse(text)
    try:
        return build(name, total_steps, **options)
    except ConfigurationError as error:
        if not options:
            raise
        # The text replaces the recipe's name at the start of messages.
        problems = [problem.removeprefix(f"recipe {name!r}: ") for problem in error.problems]
        raise ConfigurationError([f"{text}: {problem}" for problem in problems]) from None


def write(name: str, options: Mapping[str, Any]) -> str:
    """The text of a recipe and its options, the inverse of `parse`."""
    given = ",".join(f"{option}={written(value)}" for option, value in options.items())
    return f"{name}:{given}" if given else name


def canonical(text: str) -> str:
    """The same recipe in a unique text: options in the order of the signature, values in one form.

    Raises:
        ConfigurationError: as for `parse`.
    """
    name, options = parse(text)
    return write(name, {option: options[option] for option in options_of(name) if option in options})
