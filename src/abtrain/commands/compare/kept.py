"""Run folders that are kept: what each run was asked for, and whether that is what is asked for now.

request.toml     the settings of the run, resolved: what `abtrain train --config` is given
request.json     the settings of the method, the recipe that they build, and the version of abtrain

Two requests are the same if they ask for the same method, whatever their files look like: settings are parsed, resolved
and compared by value. Nothing here removes a run of other settings that its user has not given up.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from abtrain.commands.compare.method import (
    DEFAULTS,
    SETTINGS,
    Method,
    method_of,
    recipe_differences,
    resolved,
    setting_differences,
)
from abtrain.commands.compare.result_files import is_empty, read_record, read_text
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.config_file import from_values, to_toml
from abtrain.errors import ConfigurationError, DataError
from abtrain.files import write_json, write_whole
from abtrain.version import __version__

REQUEST_FILE, RECORD_FILE = "request.toml", "request.json"
RESULT_FILE, TRAIN_FOLDER = "result.json", "train"
LOCK_FILE = ".lock"
_OWN_FILES = frozenset({REQUEST_FILE, RECORD_FILE, f"{REQUEST_FILE}.partial", f"{RECORD_FILE}.partial"})


class FolderRun(Protocol):
    """A run and the folder that it has for itself."""

    @property
    def folder(self) -> Path:
        """The run's folder."""

    @property
    def config(self) -> TrainConfig:
        """Settings of the run."""

    def check_results(self) -> None:
        """
        Raises:
            DataError: the folder holds results that cannot be used.
        """


def request_text(config: TrainConfig) -> str:
    """The content of request.toml: the settings of the method, and what else differs from its default."""
    whole = dataclasses.replace(resolved(config), device=config.device)
    lines = [f"# resolved by abtrain {__version__}"]
    for line in to_toml(whole).splitlines():
        name = line.partition(" = ")[0]
        if name in SETTINGS or getattr(whole, name) != DEFAULTS[name]:
            lines.append(line)
    return "".join(f"{line}\n" for line in lines)


def write_request(folder: Path, config: TrainConfig) -> None:
    """Writes both files, and makes the folder if it is not there.

    Raises:
        ConfigurationError: they cannot be written.
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


def is_done(folder: Path, config: TrainConfig, *results: Path) -> bool:
    """Whether a run of the same method is in the folder, with all of its results. An empty file is none."""
    there = all(os.path.lexists(result) and not is_empty(result) for result in results)
    return there and not differences(folder, config)


def refusal(folder: Path, config: TrainConfig) -> str | None:
    """Why a run may not go into a folder unless its user gives up what the folder holds; None if it may."""
    try:
        held = {entry.name for entry in folder.iterdir()} if os.path.lexists(folder) else set()
    except OSError as error:
        return f"run folder {folder} cannot be read: {error}. Move it away, or name another --out"
    if held <= _OWN_FILES:
        return None
    found = differences(folder, config)
    if not found:
        return None
    return (
        f"run folder {folder} holds a run with other settings ({'; '.join(found)}): add --overwrite to replace this "
        "run, or name another --out"
    )


def check(places: Iterable[FolderRun], overwrite: bool, problems: Sequence[str] = ()) -> None:
    """Looks into the folders of all runs before the first of them is run.

    Args:
        places: of the runs.
        overwrite: whether runs with other settings are given up.
        problems: what else is wrong with the runs' settings.

    Raises:
        ConfigurationError: the problems, and folders that hold runs with other settings.
        DataError: results that are damaged. These are not run again, since they would have to be removed first.
    """
    refused, damaged = list(problems), []
    for place in places:
        reason = refusal(place.folder, place.config)
        if reason is not None:
            refused += [] if overwrite and place.folder.is_dir() else [reason]
            continue
        try:
            place.check_results()
        except DataError as error:
            damaged.append(str(error))
    if refused:
        raise ConfigurationError([*refused, *damaged])
    if damaged:
        raise DataError("\n".join(damaged))


def make_room(place: FolderRun, overwrite: bool) -> bool:
    """Removes a run with other settings that its user has given up; returns whether there was one.

    Raises:
        ConfigurationError: the user has not given it up, or it cannot be removed.
    """
    reason = refusal(place.folder, place.config)
    if reason is None:
        return False
    if not (overwrite and place.folder.is_dir()):
        raise ConfigurationError(reason)
    remove(place.folder)
    return True


def remove(folder: Path) -> None:
    """Removes a folder, if it is there; of a link only the link.

    Raises:
        ConfigurationError: it cannot be removed, or a run that is under way writes to it.
    """
    for place in (folder, folder / TRAIN_FOLDER):
        if (place / LOCK_FILE).is_file():
            with held(place):
                pass
    try:
        if folder.is_symlink():
            folder.unlink()
        elif folder.exists():
            shutil.rmtree(folder)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be removed: {error}. Move it away, or name another --out") from error


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Inside, what cannot be written under `out` costs nothing but what was to be written.

    Raises:
        ConfigurationError: something cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"--out {out} cannot be written: {error}. The runs that are done are kept: mend this, and run again"
        ) from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps a folder of runs to this process: another one would take its unfinished runs for abandoned ones.

    Raises:
        ConfigurationError: another process has it.
    """
    with (folder / LOCK_FILE).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"--out {folder} is in use by another process: wait for its end, or name another folder"
            ) from None
        yield


def versions_note(versions: Iterable[str | None]) -> str:
    """Returns a note on tables that mix results of several versions of abtrain; empty if there is one version."""
    found = sorted({version or "unknown" for version in versions})
    return f"Results of several versions of abtrain: {', '.join(found)}." if len(found) > 1 else ""


def differences(folder: Path, config: TrainConfig) -> list[str]:
    """How the method that a folder's run was asked for differs from that of `config`, a message each.

    A file of the request that cannot be read is a difference too. A result says by itself how it was trained: a request
    without defaults, which earlier versions wrote, does not say what they were.
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
    """Those of request.json, and the settings that another version of abtrain has and this one does not know."""
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
    """Those of the settings in a result; whether the result can be used is for its reader to say."""
    for path in (folder / TRAIN_FOLDER / RESULT_FILE, folder / RESULT_FILE):
        try:
            values = read_record(path).mapping("config")
            given = {name: value for name, value in values.items() if value is not None and name in DEFAULTS}
            from_values(given, "there")
        except (DataError, ConfigurationError):
            continue
        return setting_differences(given, wanted, frozenset())
    return []
