"""Defines a comparison, and validates the arguments of `abtrain compare`."""

from __future__ import annotations

import argparse
import contextlib
import os
import reprlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abtrain.commands.compare.contestants import Contestant, contestants
from abtrain.commands.files import write_json
from abtrain.commands.lab.config import LabConfig, config_problems, parse_link_rate, system_problems
from abtrain.commands.page import missing_packages
from abtrain.commands.runs.folder_run import held
from abtrain.commands.runs.result_files import read_record
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.folder_content import LOCK_FILE
from abtrain.commands.units import parse_all
from abtrain.errors import ConfigurationError, DataError, nearest
from abtrain.files import is_leftover

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Comparison:
    """The recipes to compare, and the conditions of their runs.

    Attributes:
        contestants: the recipes with their options. The references come first.
        lab: the settings of the cluster. The table shows results at its link rate.
        more_rates: further link rates in bits per second. Every recipe runs once at each of them.
        seeds: the random seeds of the runs at the lab's link rate.
        task: the name of the task that all runs train.
        steps: the number of steps of each run.
        out: the folder into which all files are written.
        overwrite: whether runs with other settings are replaced.
    """

    contestants: tuple[Contestant, ...]
    lab: LabConfig
    more_rates: tuple[int, ...]
    seeds: tuple[int, ...]
    task: str
    steps: int
    out: Path
    overwrite: bool = False

    def settings(self) -> dict[str, Any]:
        """Returns the settings that all runs at the lab's link rate share, by name."""
        return {
            "task": self.task,
            "steps": self.steps,
            "nodes": self.lab.nodes,
            "workers_per_node": self.lab.workers_per_node,
            "rate": self.lab.rate(0),
        }


def checked(given: argparse.Namespace) -> Comparison:
    """Returns the comparison that arguments request. Checks that this system can run it.

    Raises:
        ConfigurationError: the arguments are invalid, or this system cannot run a lab. The error lists all problems.
    """
    problems = [*system_problems(), *missing_packages()]
    rates = parse_all([given.rate, *filter(None, given.more_rates.split(","))], parse_link_rate, problems)
    lab = LabConfig(given.nodes, (rates[0] if rates else LabConfig.rates[0],), given.workers_per_node)
    problems += config_problems(lab)
    for name in ("seeds", "steps"):
        number = getattr(given, name)
        if number is not None and number < 1:
            problems.append(f"--{name} {number} is too small: use at least 1")
    task = TASKS.get(given.task)
    # The checks of the recipes need a valid number of steps.
    default = 1 if task is None else task.steps
    steps = default if given.steps is None or given.steps < 1 else given.steps
    group = given.workers_per_node if given.nodes > 1 else 1
    workers = given.nodes * given.workers_per_node
    common = {"task": given.task, "steps": steps, "workers": workers, "group_size": group}
    found: list[Contestant] = []
    try:
        found = contestants(given.recipes, _learning_rates(given.lr, problems), common)
    except ConfigurationError as error:
        problems += error.problems if task else [f"unknown task {given.task!r}: {nearest(given.task, TASKS)}"]
    out = given.out or Path("runs") / f"compare-{given.task}"
    seeds = tuple(range(given.seeds))
    comparison = Comparison(tuple(found), lab, tuple(rates[1:]), seeds, given.task, steps, out, given.overwrite)
    problems += _folder_problems(comparison)
    if problems:
        raise ConfigurationError(list(dict.fromkeys(problems)))
    return comparison


@contextlib.contextmanager
def held_folder(comparison: Comparison) -> Iterator[None]:
    """Creates the folder of a comparison, locks it, and records the settings that all runs share.

    Raises:
        ConfigurationError: another process uses the folder, or the folder cannot be used for this comparison.
    """
    out = comparison.out
    with contextlib.ExitStack() as stack:
        try:
            out.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(out))
            # Another process may have used the folder since the arguments were parsed.
            problems = _folder_problems(comparison)
            if not problems:
                write_json(out / SETTINGS_FILE, comparison.settings())
        except OSError as error:
            raise ConfigurationError(f"--out {out} cannot be written: {error}. Name another folder") from error
        if problems:
            raise ConfigurationError(problems)
        yield


def _learning_rates(texts: Sequence[str], problems: list[str]) -> dict[str, float]:
    rates = {}
    for text in texts:
        name, _, value = text.rpartition("=")
        try:
            rates[name] = float(value)
        except ValueError:
            name = ""
        if not name:
            problems.append(f"--lr {text!r} cannot be read: use RECIPE=VALUE, such as ab=4e-3")
    return rates


def _folder_problems(comparison: Comparison) -> list[str]:
    """Returns a message for each reason why the folder cannot be used.

    The list is empty if the folder is unused, or if it contains runs under the same conditions.
    """
    file, wanted = comparison.out / SETTINGS_FILE, comparison.settings()
    try:
        if not os.path.lexists(file):
            used = comparison.out.exists() and (not comparison.out.is_dir() or _has_content(comparison.out))
            remedy = "name a folder that is empty or contains a comparison"
            return [f"--out {comparison.out} is neither empty nor the folder of a comparison: {remedy}"] if used else []
        there = read_record(file).content
    except (OSError, DataError) as error:
        return [f"--out {comparison.out} cannot be read: {error}. Name another folder"]
    differing = [
        f"{name} was {reprlib.repr(there.get(name))} and is {value} now"
        for name, value in wanted.items()
        if there.get(name) != value
    ]
    if not differing:
        return []
    return [
        f"--out {comparison.out} contains a comparison with other settings ({'; '.join(differing)}): name another "
        "folder"
    ]


def _has_content(folder: Path) -> bool:
    """Returns whether a folder contains more than a lock file and files that a crash left behind."""
    return any(path.name != LOCK_FILE and not is_leftover(path) for path in folder.iterdir())
