"""Lists the named recipes, and parses and writes recipes as strings, such as `ab_outer:every=40`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.ab_outer import ab_local, ab_outer
from abtrain.recipes.automatic import auto
from abtrain.recipes.full_rank import ddp, diloco, local_sgd, powersgd, solo
from abtrain.recipes.options import Option, declared_options, read_options, written
from abtrain.recipes.paper import ab, ab_no_groups
from abtrain.recipes.recipe import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    recipe.__name__: recipe
    for recipe in (ab, ab_local, ab_no_groups, ab_outer, auto, ddp, diloco, local_sgd, powersgd, solo)
}
DEFAULT = "ab_outer"


def options_of(name: str) -> Mapping[str, Option]:
    """Returns the options that a recipe takes, by name, in the order of its signature.

    Raises:
        ConfigurationError: no recipe has this name.
    """
    if name not in RECIPES:
        raise ConfigurationError(f"unknown recipe {name!r}: {nearest(name, RECIPES)}")
    return declared_options(RECIPES[name])


def build(name: str, total_steps: int, /, **options: Any) -> Recipe:
    """Returns the recipe called `name`, built with the given options.

    Raises:
        ConfigurationError: the name or an option is unknown, or values are invalid; one message for each problem.
    """
    options_of(name)  # refuses unknown names
    return RECIPES[name](total_steps, **options)


def parse(text: str) -> tuple[str, dict[str, Any]]:
    """Reads RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE, and returns the recipe's name and the options as a dict.

    Raises:
        ConfigurationError: the recipe is unknown, or options are invalid (see `read_options`).
    """
    name, _, options = text.partition(":")
    return name, read_options(name, options, options_of(name))


def from_text(text: str, total_steps: int) -> Recipe:
    """Returns the recipe that a string describes, such as `ab_outer:every=40,wire=int4`.

    Raises:
        ConfigurationError: as for `parse` and `build`; messages about values begin with the string.
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
    """Returns the string that describes a recipe with these options. `parse` reads it."""
    given = ",".join(f"{option}={written(value)}" for option, value in options.items())
    return f"{name}:{given}" if given else name
