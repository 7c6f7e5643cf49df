"""Determines the method of a run (its resolved settings and its recipe), and compares methods."""

from __future__ import annotations

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from abtrain.comm.checksums import stable_repr
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import MAY_CHANGE_ON_RESUME, TrainConfig, recipe_of, resolve
from abtrain.commands.train.config_file import from_values
from abtrain.errors import ConfigurationError
from abtrain.version import __version__

DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrainConfig)}
SETTINGS = tuple(name for name in DEFAULTS if name == "workers" or name not in MAY_CHANGE_ON_RESUME)
"""The settings that are part of a method. The number of workers is one of them because it affects measurements."""


@dataclass(frozen=True)
class Method:
    """The method of a run: everything that determines its result.

    Attributes:
        settings: the settings by name, with the defaults filled in.
        recipe: the recipe that the settings build, as a JSON value.
    """

    settings: Mapping[str, Any]
    recipe: Any


def method_of(config: TrainConfig) -> Method:
    """Returns the method of a run with these settings, which must be valid, in this version of abtrain."""
    whole = resolved(config)
    return Method(_settings(whole), _described(recipe_of(whole)))


def setting_differences(values: Mapping[str, Any], wanted: Method, excused: frozenset[str]) -> list[str]:
    """Returns a message for each setting that differs from a method's.

    Args:
        values: the settings by name; this version's defaults apply to missing ones.
        wanted: the method to compare the settings with.
        excused: the names of settings that are ignored if this version does not have them.
    """
    known = {name: value for name, value in values.items() if name in DEFAULTS and name != "config"}
    found = [
        f"{name} was {reprlib.repr(value)} and is unknown to abtrain {__version__}"
        for name, value in values.items()
        if name not in known and name not in excused
    ]
    try:
        there = _settings(resolved(from_values(known, "there")))
    except ConfigurationError as error:
        return [*found, *error.problems]
    found += [
        f"{name} was {there[name]!r} and is {value!r} now"
        for name, value in wanted.settings.items()
        if there[name] != value
    ]
    return found


def recipe_differences(there: Any, here: Any, place: str = "recipe") -> list[str]:
    """Returns a message for each difference between two recipes that the same settings built.

    Such recipes differ only if two versions of abtrain have different defaults. A field that only one of the recipes
    has is ignored.
    """
    if isinstance(there, dict) and isinstance(here, dict) and there.get("kind") == here["kind"]:
        both = [name for name in here if name in there]
        return [line for name in both for line in recipe_differences(there[name], here[name], f"{place}.{name}")]
    if isinstance(there, list) and isinstance(here, list) and len(there) == len(here):
        pairs = enumerate(zip(there, here, strict=True))
        return [line for n, (one, other) in pairs for line in recipe_differences(one, other, f"{place}[{n}]")]
    if there == here:
        return []
    return [f"{place} was {reprlib.repr(there)} and is {reprlib.repr(here)} now, since its default has changed"]


def resolved(config: TrainConfig) -> TrainConfig:
    """Returns the settings with their task's defaults filled in; unchanged if the task is unknown.

    The device is set to the CPU, because it is not part of the method.
    """
    return resolve(dataclasses.replace(config, device="cpu")) if config.task in TASKS else config


def _settings(config: TrainConfig) -> dict[str, Any]:
    return {name: getattr(config, name) for name in SETTINGS}


def _described(value: Any) -> Any:
    """Returns a recipe, or a value inside a recipe, as a JSON value."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _described(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"kind": type(value).__name__, **fields}
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    plain = value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))
    return value if plain else stable_repr(value)
