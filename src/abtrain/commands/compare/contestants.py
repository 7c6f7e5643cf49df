"""The contestants of a comparison: recipes with their options from the command line."""

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
"""Recipes in every comparison: solo limits the speed, ddp is the reference for bytes, and ddp in bf16 for seconds."""


@dataclass(frozen=True)
class Contestant:
    """A recipe with options.

    Attributes:
        label: the recipe as a string, RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE.
        config: the settings of the contestant's runs, except for the seed.
    """

    label: str
    config: TrainConfig


def contestants(texts: Sequence[str], rates: Mapping[str, float], common: Mapping[str, Any]) -> list[Contestant]:
    """Returns the reference recipes and the requested contestants, without duplicates.

    Args:
        texts: the requested contestants as strings, RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE.
        rates: the learning rates, by the label of a contestant or by the name of a recipe.
        common: the settings that all contestants share.

    Raises:
        ConfigurationError: lists everything that is wrong with the contestants or the learning rates.
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
    problems += [f"--lr {name}=...: {name} is not in this comparison: add it, or leave out --lr" for name in unknown]
    if problems:
        raise ConfigurationError(list(dict.fromkeys(problems)))
    return found


def _contestant(text: str, rates: Mapping[str, float], common: Mapping[str, Any]) -> Contestant:
    name, _ = recipes.parse(text)
    rate = rates.get(text, rates.get(name))
    own = {} if rate is None else {"lr": rate}
    return Contestant(text, from_values({**common, "recipe": text, **own}, text))
