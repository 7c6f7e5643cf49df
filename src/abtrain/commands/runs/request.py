"""Writes the request of a run (its settings as files in its folder), and compares it with other settings.

request.toml     the resolved settings, for `abtrain train --config`
request.json     the settings of the method, the recipe that they build, and the version of abtrain

Two requests are equal if they ask for the same method. Settings are parsed, resolved and compared by value, so
formatting and comments in the files do not matter.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
from pathlib import Path

from abtrain.commands.files import write_json, write_whole
from abtrain.commands.runs.method import (
    DEFAULTS,
    SETTINGS,
    Method,
    method_of,
    recipe_differences,
    resolved,
    setting_differences,
)
from abtrain.commands.runs.result_files import read_record, read_text
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.config_file import from_values, to_toml
from abtrain.commands.train.folder_content import RESULT_FILE
from abtrain.errors import ConfigurationError, DataError
from abtrain.version import __version__

REQUEST_FILE, RECORD_FILE, TRAIN_FOLDER = "request.toml", "request.json", "train"
FILES = frozenset({REQUEST_FILE, RECORD_FILE})
"""The names of the files of a request."""


def request_text(config: TrainConfig) -> str:
    """Returns the content of request.toml: the method's settings, and other settings that are not the default."""
    whole = dataclasses.replace(resolved(config), device=config.device)
    lines = [f"# resolved by abtrain {__version__}"]
    for line in to_toml(whole).splitlines():
        name = line.partition(" = ")[0]
        if name in SETTINGS or getattr(whole, name) != DEFAULTS[name]:
            lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def write_request(folder: Path, config: TrainConfig) -> None:
    """Writes request.toml and request.json, and creates the folder if it does not exist.

    Raises:
        ConfigurationError: a file cannot be written.
    """
    method = method_of(config)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / REQUEST_FILE, request_text(config))
        write_json(
            folder / RECORD_FILE,
            {"abtrain": __version__, "settings": dict(method.settings), "recipe": method.recipe},
        )
    except OSError as error:
        raise ConfigurationError(f"run folder {folder} cannot be written: {error}. Name another --out") from error


def request_differences(folder: Path, config: TrainConfig) -> list[str]:
    """Returns a message for each difference between the method of the run in a folder and that of `config`.

    A request that cannot be read counts as a difference. Early versions left defaults out of requests. For their
    runs, the settings in the result show which defaults applied.
    """
    wanted = method_of(config)
    found: list[str] = []
    excused: frozenset[str] = frozenset()
    recorded = os.path.lexists(folder / RECORD_FILE)
    if recorded:
        found, excused = _record_differences(folder, wanted)
    if os.path.lexists(folder / REQUEST_FILE) or not recorded:
        found += _toml_differences(folder / REQUEST_FILE, wanted, excused)
    return list(dict.fromkeys(found)) or _result_differences(folder, wanted)


def _record_differences(folder: Path, wanted: Method) -> tuple[list[str], frozenset[str]]:
    """Returns messages about differences between request.json and `wanted`, and the settings to ignore elsewhere.

    These are the names of settings that another version of abtrain wrote and this version does not have.
    """
    try:
        record = read_record(folder / RECORD_FILE)
        version, settings = record.text("abtrain"), record.mapping("settings")
        recipe = record.content.get("recipe")
    except DataError as error:
        return [str(error)], frozenset()
    excused = frozenset(settings.keys() - DEFAULTS.keys()) if version != __version__ else frozenset()
    found = setting_differences({name: value for name, value in settings.items() if value is not None}, wanted, excused)
    return found or recipe_differences(recipe, wanted.recipe), excused


def _toml_differences(path: Path, wanted: Method, excused: frozenset[str]) -> list[str]:
    try:
        values = tomllib.loads(read_text(path))
    except DataError as error:
        return [str(error)]
    except (ValueError, RecursionError) as error:
        return [f"{path.name} cannot be parsed: {error}"]
    return setting_differences(values, wanted, excused)


def _result_differences(folder: Path, wanted: Method) -> list[str]:
    """Returns a message for each setting in result.json that differs from `wanted`.

    The list is empty if the file is missing or damaged: the code that reads results reports damaged files.
    """
    for path in (folder / TRAIN_FOLDER / RESULT_FILE, folder / RESULT_FILE):
        try:
            values = read_record(path).mapping("config")
            given = {name: value for name, value in values.items() if value is not None and name in DEFAULTS}
            from_values(given, "there")
        except (DataError, ConfigurationError):
            continue
        return setting_differences(given, wanted, frozenset())
    return []
