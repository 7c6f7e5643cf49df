"""The named recipes: data only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.ab_outer import ab_local, ab_outer
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.full_rank import ddp, diloco, local_sgd, powersgd, solo
from abtrain.recipes.paper import ab, ab_no_groups
from abtrain.recipes.recipe import Recipe

RECIPES: dict[str, Callable[..., Recipe]] = {
    "ab": ab,
    "ab_local": ab_local,
    "ab_no_groups": ab_no_groups,
    "ab_outer": ab_outer,
    "ddp": ddp,
    "diloco": diloco,
    "local_sgd": local_sgd,
    "powersgd": powersgd,
    "solo": solo,
}
DEFAULT = "ab_outer"


def options_of(name: str) -> frozenset[str]:
    """Names of the options that a recipe takes.

    Raises:
        ConfigurationError: no recipe is called so.
    """
    if name not in RECIPES:
        raise ConfigurationError(f"unknown recipe {name!r}: {nearest(name, RECIPES)}")
    options: set[str] = set()
    for parameter in inspect.signature(RECIPES[name]).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            options.add(parameter.name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            options.update(set(Factoring.__dataclass_fields__) - {"rank_rule"})
    return frozenset(options)


def build(name: str, total_steps: int, /, **options: Any) -> Recipe:
    """The recipe called `name`.

    Raises:
        ConfigurationError: an unknown name or option, or values that cannot be; all of them at once.
    """
    known = options_of(name)
    unknown = [f"recipe {name!r} has no option {o!r}: {nearest(o, known)}" for o in options if o not in known]
    if unknown:
        raise ConfigurationError(unknown)
    return RECIPES[name](total_steps, **options)
