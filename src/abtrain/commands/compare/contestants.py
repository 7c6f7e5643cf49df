"""What takes part in a comparison: a recipe with its options, as the command line writes it."""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from abtrain.commands.train.config import TrainConfig, notices
from abtrain.commands.train.config_file import from_values
from abtrain.commands.train.config_problems import validate
from abtrain.errors import ConfigurationError

SOLO, DDP, DDP_BF16 = "solo", "ddp", "ddp:wire=bf16"
REFERENCES = (SOLO, DDP, DDP_BF16)
"""Take part in every comparison: the limit in speed, what bytes are compared with, and what seconds are."""


@dataclass(frozen=True)
class Contestant:
    """A recipe with options.

    Attributes:
        label: as it is written, RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE.
        config: its settings, but for the seed.
    """

    label: str
    config: TrainConfig


def contestants(texts: Sequence[str], rates: Mapping[str, float], common: Mapping[str, Any]) -> list[Contestant]:
    """The references and those that are asked for, each once.

    Args:
        texts: as the command line has them.
        rates: learning rates, by label or by the name of the recipe.
        common: settings of all.

    Raises:
        ConfigurationError: all that is wrong with any of them.
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
        problems += [f"{text}: {problem}" for problem in own]
        found.append(contestant)
    recipes = {contestant.config.recipe for contestant in found}
    labels = {contestant.label for contestant in found}
    problems += [f"--lr {name}=...: {name} takes no part" for name in rates if name not in recipes | labels]
    if problems:
        raise ConfigurationError(list(dict.fromkeys(problems)))
    return found


def _contestant(text: str, rates: Mapping[str, float], common: Mapping[str, Any]) -> Contestant:
    recipe, options = recipe_and_options(text)
    rate = rates.get(text, rates.get(recipe))
    own = {} if rate is None else {"lr": rate}
    return Contestant(text, from_values({**common, "recipe": recipe, **own, **options}, text))


def recipe_and_options(text: str) -> tuple[str, dict[str, Any]]:
    """The parts of RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE.

    Raises:
        ConfigurationError: an option has no value.
    """
    recipe, _, options = text.partition(":")
    values = {}
    for option in filter(None, options.split(",")):
        name, equals, value = option.partition("=")
        if not equals:
            raise ConfigurationError(f"{text}: {option!r} cannot be read: use OPTION=VALUE, such as ddp:wire=bf16")
        values[name.strip().replace("-", "_")] = _value(value.strip())
    return recipe, values


def _value(text: str) -> Any:
    """A value as TOML would have it; what is none of its values is a string, without quotes."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def with_seed(config: TrainConfig, seed: int) -> TrainConfig:
    """The settings of one run."""
    return dataclasses.replace(config, seed=seed)
