"""Manages runs, each with its own folder: executes unfinished runs, and replaces runs with other settings."""

from __future__ import annotations

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from abtrain.commands import files
from abtrain.commands.runs.request import FILES, TRAIN_FOLDER, request_differences
from abtrain.commands.runs.result_files import is_empty
from abtrain.commands.train.config import TrainConfig
from abtrain.commands.train.folder_content import LOCK_FILE
from abtrain.errors import ConfigurationError, DataError
from abtrain.files import is_leftover


class Once(Protocol):
    """The interface of a run that `run_once` can execute."""

    @property
    def done(self) -> bool:
        """Whether the run has finished with its current settings."""


OnceT = TypeVar("OnceT", bound=Once)


class FolderRun(ABC):
    """A run with its own folder. If the folder contains a run with other settings, only `--overwrite` removes it.

    Attributes:
        folder: the folder with the run's request (see `request.py`) and its results.
    """

    folder: Path

    @property
    @abstractmethod
    def config(self) -> TrainConfig:
        """The settings of the run."""

    @property
    @abstractmethod
    def results(self) -> tuple[Path, ...]:
        """The result files of a finished run. The first one is the result of training."""

    @abstractmethod
    def check_results(self) -> None:
        """Checks the result files, if there are any.

        Raises:
            DataError: a result file is damaged.
        """

    @property
    def done(self) -> bool:
        """Whether the folder contains all result files, none of them empty, of a run with the same method."""
        complete = all(os.path.lexists(result) and not is_empty(result) for result in self.results)
        return complete and not request_differences(self.folder, self.config)

    def refusal(self) -> str | None:
        """Returns why the run may not use its folder without `--overwrite`; None if it may."""
        try:
            entries = list(self.folder.iterdir()) if os.path.lexists(self.folder) else []
        except OSError as error:
            return f"run folder {self.folder} cannot be read: {error}. Make it readable, or name another --out"
        is_new = all(entry.name in FILES or is_leftover(entry) for entry in entries)
        found = [] if is_new else request_differences(self.folder, self.config)
        if not found:
            return None
        return (
            f"run folder {self.folder} contains a run with other settings ({'; '.join(found)}): add --overwrite to "
            "replace that run, or name another --out"
        )

    def make_room(self, overwrite: bool) -> bool:
        """Removes a run with other settings from the folder, and returns whether there was one.

        Raises:
            ConfigurationError: such a run exists, but `overwrite` is not set, or the run cannot be removed.
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
    """Executes the unfinished runs in order. If one fails or is stopped, the results of the earlier ones remain.

    Args:
        planned: all runs, without duplicates.
        runner: a context manager that yields a function, which executes one run and records its result. The context is
            entered only if a run is unfinished, because building a lab or loading data takes time.
        say: prints a line.
        in_short: returns a short description of a run's result, for the line that says that it has finished.
    """
    missing = [run for run in planned if not run.done]
    say(f"{len(planned)} runs, {len(planned) - len(missing)} of them already finished")
    if not missing:
        return
    with runner as run_one:
        for number, run in enumerate(missing, 1):
            run_one(run)
            say(f"{number}/{len(missing)} {run}: {in_short(run)}")


def check_folders(runs: Sequence[FolderRun], overwrite: bool, problems: Sequence[str] = ()) -> None:
    """Checks the folders of all planned runs, before any of the runs starts.

    Args:
        runs: all planned runs.
        overwrite: whether runs with other settings may be removed.
        problems: messages about other problems, which are reported together with those about folders.

    Raises:
        ConfigurationError: there are `problems`, folders that cannot be read, or runs with other settings that may not
            be removed.
        DataError: result files are damaged. They are kept, because they may be restored.
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
        ConfigurationError: the folder cannot be removed, or another process writes to it.
    """
    for place in (folder, folder / TRAIN_FOLDER):
        if files.is_regular(place / LOCK_FILE):
            with held(place):
                pass
    try:
        files.remove(folder)
    except OSError as error:
        raise ConfigurationError(f"{folder} cannot be removed: {error}. Move it away, or name another --out") from error


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turns an OSError in the `with` block, which writes to `out`, into a ConfigurationError."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"--out {out} cannot be written: {error}. Correct this, and run the command again. Finished runs are kept"
        ) from error


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Locks a folder of runs in the `with` block. Otherwise another process could execute the same runs meanwhile.

    Raises:
        ConfigurationError: another process has locked the folder, or the folder cannot be written.
    """
    with writing(folder):
        lock = files.FolderLock(folder / LOCK_FILE)
    try:
        yield
    finally:
        lock.release()


def kept_in(out: Path) -> str:
    """Returns the end of a stopped command's message, which says what remains and how to continue."""
    return f": finished runs are kept in {out}, and the same command continues with the others"
