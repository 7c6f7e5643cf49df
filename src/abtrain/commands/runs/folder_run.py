"""Runs that have a folder each: finds out which are done and what may be removed, and starts the missing ones."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from abtrain.commands.runs.request import FILES, TRAIN_FOLDER, request_differences
from abtrain.commands.runs.result_files import is_empty
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.folder_content import LOCK_FILE
from abtrain.errors import ConfigurationError, DataError


class Once(Protocol):
    """A run that knows whether its result is recorded."""

    @property
    def done(self) -> bool:
        """Whether the run has finished with its current settings."""


OnceT = TypeVar("OnceT", bound=Once)


class FolderRun(ABC):
    """A run with its own folder. A run with other settings in the folder is removed only with `--overwrite`.

    Attributes:
        folder: the folder of the request (see `request.py`) and the results.
    """

    folder: Path

    @property
    @abstractmethod
    def config(self) -> TrainConfig:
        """The settings of the run."""

    @property
    @abstractmethod
    def results(self) -> tuple[Path, ...]:
        """The files that a finished run leaves. The first one is the result of training."""

    @abstractmethod
    def check_results(self) -> None:
        """Reads the results if there are any.

        Raises:
            DataError: they are damaged.
        """

    @property
    def done(self) -> bool:
        """Whether the folder holds all results of a run of the same method. An empty file does not count."""
        complete = all(os.path.lexists(result) and not is_empty(result) for result in self.results)
        return complete and not request_differences(self.folder, self.config)

    def refusal(self) -> str | None:
        """Returns why the run may not use its folder without `--overwrite`; None if it may."""
        try:
            held = {entry.name for entry in self.folder.iterdir()} if os.path.lexists(self.folder) else set()
        except OSError as error:
            return f"run folder {self.folder} cannot be read: {error}. Move it away, or name another --out"
        found = [] if held <= FILES else request_differences(self.folder, self.config)
        if not found:
            return None
        return (
            f"run folder {self.folder} holds a run with other settings ({'; '.join(found)}): add --overwrite to "
            "replace this run, or name another --out"
        )

    def make_room(self, overwrite: bool) -> bool:
        """Removes a run with other settings, and returns whether there was one.

        Raises:
            ConfigurationError: there is one, and `overwrite` is not set or it cannot be removed.
        """
        reason = self.refusal()
        if reason is None:
            return False
        if not (overwrite and self.folder.is_dir()):
            raise ConfigurationError(reason)
        remove(self.folder)
        return True


def run_once(
    planned: Sequence[OnceT],
    runner: contextlib.AbstractContextManager[Callable[[OnceT], object]],
    say: Callable[[str], object],
    in_short: Callable[[OnceT], str],
) -> None:
    """Runs everything that is not done, in order. Finished runs are kept if this is stopped or fails.

    Args:
        planned: all runs, without duplicates.
        runner: a context manager whose value executes one run and records its result. It is entered only if a run is
            missing, because building a lab or loading data takes time.
        say: prints a line.
        in_short: describes the result of a run, for the line that reports its end.
    """
    missing = [run for run in planned if not run.done]
    say(f"{len(planned)} runs, {len(planned) - len(missing)} of them done before")
    if not missing:
        return
    with runner as run_one:
        for number, run in enumerate(missing, 1):
            run_one(run)
            say(f"{number}/{len(missing)} {run}: {in_short(run)}")


def check_folders(runs: Sequence[FolderRun], overwrite: bool, problems: Sequence[str] = ()) -> None:
    """Inspects the folders of all planned runs before any of them starts.

    Args:
        runs: all planned runs.
        overwrite: whether runs with other settings may be removed.
        problems: other problems of the runs, to be reported together with those of the folders.

    Raises:
        ConfigurationError: the problems, and folders that hold runs with other settings.
        DataError: some results are damaged. They are not replaced, because that would remove them.
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
    """Removes a folder if it exists. If it is a link, only the link is removed.

    Raises:
        ConfigurationError: it cannot be removed, or another process writes to it.
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
    """Turns an OSError while tables and pages are written to `out` into a ConfigurationError."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"--out {out} cannot be written: {error}. Finished runs are kept: fix this, and run again"
        ) from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Locks a folder of runs for this process. Otherwise another one would mistake unfinished runs for abandoned ones.

    Raises:
        ConfigurationError: another process has locked it.
    """
    with (folder / LOCK_FILE).open("a", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigurationError(
                f"--out {folder} is in use by another process: wait for it to finish, or name another folder"
            ) from None
        yield
