"""Runs that each have a folder: request, results, and what may be removed from it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path

from abtrain.commands.runs.request import FILES, TRAIN_FOLDER, differences
from abtrain.commands.runs.result_files import is_empty
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.folder_content import LOCK_FILE
from abtrain.errors import ConfigurationError, DataError


class FolderRun(ABC):
    """A run in a folder of its own. A run with other settings is never removed unless its user has given it up.

    Attributes:
        folder: holds the request (see `request.py`) and the results.
    """

    folder: Path

    @property
    @abstractmethod
    def config(self) -> TrainConfig:
        """The settings of the run."""

    @property
    @abstractmethod
    def results(self) -> tuple[Path, ...]:
        """The files that a finished run leaves, the result of training first."""

    @abstractmethod
    def check_results(self) -> None:
        """Reads the results, if the folder holds any.

        Raises:
            DataError: they cannot be used.
        """

    @property
    def done(self) -> bool:
        """Whether the folder holds all results of a run of the same method. An empty file is no result."""
        there = all(os.path.lexists(result) and not is_empty(result) for result in self.results)
        return there and not differences(self.folder, self.config)

    def refusal(self) -> str | None:
        """Explains why the run may not use its folder unless the user gives up its content; None if it may."""
        try:
            held = {entry.name for entry in self.folder.iterdir()} if os.path.lexists(self.folder) else set()
        except OSError as error:
            return f"run folder {self.folder} cannot be read: {error}. Move it away, or name another --out"
        found = [] if held <= FILES else differences(self.folder, self.config)
        if not found:
            return None
        return (
            f"run folder {self.folder} holds a run with other settings ({'; '.join(found)}): add --overwrite to "
            "replace this run, or name another --out"
        )

    def make_room(self, overwrite: bool) -> bool:
        """Removes a run with other settings if the user has given it up; returns whether there was one.

        Raises:
            ConfigurationError: the user has not given it up, or it cannot be removed.
        """
        reason = self.refusal()
        if reason is None:
            return False
        if not (overwrite and self.folder.is_dir()):
            raise ConfigurationError(reason)
        remove(self.folder)
        return True


def check(runs: Sequence[FolderRun], overwrite: bool, problems: Sequence[str] = ()) -> None:
    """Inspects the folders of all runs before the first of them is run.

    Args:
        runs: all that are planned.
        overwrite: whether the user gives up runs with other settings.
        problems: what else is wrong with the settings of the runs.

    Raises:
        ConfigurationError: the problems, and folders that hold runs with other settings.
        DataError: results that are damaged. They are not replaced: that would remove them.
    """
    refused, damaged = list(problems), []
    for run in runs:
        reason = run.refusal()
        if reason is not None:
            refused += [] if overwrite and run.folder.is_dir() else [reason]
            continue
        try:
            run.check_results()
        except DataError as error:
            damaged.append(str(error))
    if refused:
        raise ConfigurationError([*refused, *damaged])
    if damaged:
        raise DataError("\n".join(damaged))


def remove(folder: Path) -> None:
    """Removes a folder if it exists; of a link, only the link.

    Raises:
        ConfigurationError: it cannot be removed, or a run in progress writes to it.
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
    """Turns failures to write tables and pages under `out` into a message that finished runs are kept.

    Raises:
        ConfigurationError: something cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"--out {out} cannot be written: {error}. The runs that are done are kept: fix this, and run again"
        ) from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Reserves a folder of runs for this process: another one would take its unfinished runs for abandoned ones.

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
