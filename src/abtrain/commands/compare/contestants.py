"""Collects the recipes that a comparison runs: reference recipes, and those from the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abtrain import recipes
from abtrain.commands.train.config import TrainConfig, notices
from abtrain.commands.train.config_file import from_values
from abtrain.commands.train.config_problems import validate
from abtrain.errors import ConfigurationError

SOLO, DDP, DDP_BF16 = "solo", "ddp", "ddp:wire=bf16"
REFERENCES = (SOLO, DDP, DDP_BF16)
"""The recipes in every comparison. `solo` shows the speed without communication. The bytes of other recipes are
compared with those of `ddp`, and their seconds with those of `ddp` in bf16."""


@dataclass(frozen=True)
class Contestant:
    """A recipe with options that takes part in a comparison.

    Attributes:
        label: the recipe as a string, RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE.
        config: the settings of its runs, except for the seed.
    """

    label: str
    config: TrainConfig


def contestants(texts: Sequence[str], rates: Mapping[str, float], common: Mapping[str, Any]) -> list[Contestant]:
    """Returns the reference recipes and the requested ones. A recipe that was requested twice is listed once.

    Args:
        texts: the requested recipes as strings, RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE.
        rates: the learning rates. A key is one of these strings, or the name of a recipe without options.
        common: the settings that all recipes share.

    Raises:
        ConfigurationError: recipes or learning rates are invalid. The error lists all problems.
    """
    problems: list[str] = []
    found: list[Contestant] = []
    for text in dict.fromkeys((*REFERENCES, *texts)):
        try:
            contestant = _contestant(text, rates, common)
        except ConfigurationError as error:
            problems += error.problems
            continue
        own = validate(contestant.config) or notices(contestant.config)
        problems += [problem if problem.startswith(f"{text}: ") else f"{text}: {problem}" for problem in own]
        found.append(contestant)
    names = {contestant.config.recipe_name for contestant in found}
    labels = {contestant.label for contestant in found}
    unknown = [name for name in rates if name not in names | labels]
    problems += [
        f"--lr {name}=... names a recipe that is not compared: add {name}, or leave out this --lr" for name in unknown
    ]
    if problems:
        raise ConfigurationError(list(dict.fromkeys(problems)))
    return found


def _contestant(text: str, rates: Mapping[str, float], common: Mapping[str, Any]) -> Contestant:
    name, _ = recipes.parse(text)
    rate = rates.get(text, rates.get(name))
    own = {} if rate is None else {"lr": rate}
    return Contestant(text, from_values({**common, "recipe": text, **own}, text))
