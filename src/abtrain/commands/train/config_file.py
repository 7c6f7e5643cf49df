"""Reads and writes the settings of a run as TOML. The keys are the names of `TrainConfig`'s fields."""

from __future__ import annotations

import dataclasses
import json
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union

from abtrain import recipes
from abtrain.commands.train.config import TrainConfig
from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.numbers import is_finite_number


def from_toml(path: Path) -> TrainConfig:
    """Reads settings from a TOML file. Missing settings get their defaults.

    Raises:
        ConfigurationError: the file cannot be read or is not TOML, or keys are unknown or have values of a wrong type.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ConfigurationError(f"--config {path} cannot be read: {error}") from error
    return from_text(text, str(path))


def from_text(text: str, source: str) -> TrainConfig:
    """Reads settings from a TOML string. Missing settings get their defaults.

    Args:
        text: the TOML string.
        source: the origin of the string, for messages.

    Raises:
        ConfigurationError: the string is not TOML, or keys are unknown or have values of a wrong type.
    """
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigurationError(f"{source} cannot be read as TOML: {error}") from error
    return from_values(content, source)


def from_values(content: Mapping[str, Any], source: str) -> TrainConfig:
    """Reads settings from a parsed TOML table. Missing settings get their defaults.

    Args:
        content: the values by the names of `TrainConfig`'s fields.
        source: the origin of the table, for messages.

    Raises:
        ConfigurationError: keys are unknown or have values of a wrong type. The error lists all of these keys.
    """
    known = typing.get_type_hints(TrainConfig)
    del known["config"]  # a file cannot name another file
    options = {option for recipe in recipes.RECIPES for option in recipes.options_of(recipe)}
    problems = []
    for key, value in content.items():
        if key in options:
            problems.append(f'{source}: {key} is an option of recipes: give it as recipe = "RECIPE:{key}=VALUE"')
        elif key not in known:
            problems.append(f"{source}: unknown key {key!r}: {nearest(key, known)}")
        elif not _fits(value, known[key]):
            problems.append(f"{source}: {key} = {value!r} is of the wrong type: use {_type_name(known[key])}")
    if problems:
        raise ConfigurationError(problems)
    return TrainConfig(**{key: _convert(value, known[key]) for key, value in content.items()})


def to_toml(config: TrainConfig) -> str:
    """Returns the settings as TOML that `from_toml` reads, without those that are None: TOML has no null."""
    names = [field.name for field in dataclasses.fields(config) if field.name != "config"]
    values = {name: getattr(config, name) for name in names}
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in values.items() if value is not None)


def _toml_value(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml_value, value))}]"
    if isinstance(value, str | Path):
        # A JSON string is a TOML string, except for one control character that JSON does not escape.
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)


def _fits(value: object, expected: Any) -> bool:
    """Whether a TOML value has the type `expected` of a setting."""
    origin = typing.get_origin(expected)
    if origin in (types.UnionType, Union):
        return any(_fits(value, option) for option in typing.get_args(expected) if option is not types.NoneType)
    if origin is Literal:
        return value in typing.get_args(expected)
    if origin is tuple:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)
    if expected is Path:
        return isinstance(value, str)
    if expected is float:
        return isinstance(value, float) or is_finite_number(value)
    if expected is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, expected)


def _convert(value: Any, expected: Any) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if Path in (expected, *typing.get_args(expected)) else value


def _type_name(expected: Any) -> str:
    options = [option for option in typing.get_args(expected) if option is not types.NoneType]
    if typing.get_origin(expected) is Literal:
        return " or ".join(map(repr, options))
    if typing.get_origin(expected) is tuple:
        return "a list of strings"
    if options:
        return " or ".join(map(_type_name, options))
    return {int: "a whole number", float: "a number", bool: "true or false"}.get(expected, "a string")
