"""The arguments of `abtrain compare`: read, and all that is wrong with them said at once."""

from __future__ import annotations

import argparse
import os
import reprlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abtrain.commands.compare.contestants import Contestant, contestants
from abtrain.commands.files import write_json
from abtrain.commands.lab.config import LabConfig, config_problems, system_problems
from abtrain.commands.lab.rates import parse_link_rate
from abtrain.commands.page import missing_packages
from abtrain.commands.runs.result_files import read_record
from abtrain.commands.tasks.task import TASKS
from abtrain.errors import ConfigurationError, DataError, nearest

SETTINGS_FILE = "settings.json"
_EXAMPLES = """\
a recipe may carry options, which `abtrain recipes RECIPE` lists:
  abtrain compare ab_outer "diloco:every=40,wire=int4" --task fashion-cnn --lr ab_outer=4e-3

solo, ddp and ddp:wire=bf16 always take part. Runs that are done are not done again: the same command with the same
--out goes on where it was stopped, and more recipes, seeds or rates may be added to it. Runs of other settings are
refused unless --overwrite gives them up."""


@dataclass(frozen=True)
class Comparison:
    """The recipes that are compared, and the conditions.

    Attributes:
        contestants: the references first.
        lab: the cluster; its rate is that of the table.
        more_rates: bits per second at which every contestant is run once more.
        seeds: of the runs at the lab's rate.
        task: that all are trained on.
        steps: of each run.
        out: folder for everything.
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
        """Returns the settings that all runs of the comparison share."""
        return {
            "task": self.task,
            "steps": self.steps,
            "nodes": self.lab.nodes,
            "workers_per_node": self.lab.workers_per_node,
            "rate": self.lab.rate(0),
        }


def parse_arguments(arguments: Sequence[str]) -> Comparison:
    """Parses a command line and checks that this system can run it.

    Raises:
        ConfigurationError: all that is wrong.
        SystemExit: --help, or an option that there is not.
    """
    given = _parser().parse_args(arguments)
    problems = [*system_problems(), *missing_packages()]
    rates = _rates([given.rate, *filter(None, given.more_rates.split(","))], problems)
    lab = LabConfig(given.nodes, (rates[0] if rates else LabConfig.rates[0],), given.workers_per_node)
    problems += config_problems(lab)
    if given.seeds < 1:
        problems.append(f"--seeds {given.seeds} is too small: use at least 1")
    task = TASKS.get(given.task)
    steps = given.steps if given.steps is not None or task is None else task.steps
    group = given.workers_per_node if given.nodes > 1 else 1
    workers = given.nodes * given.workers_per_node
    common = {"task": given.task, "steps": steps or 1, "workers": workers, "group_size": group}
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
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / SETTINGS_FILE, comparison.settings())
    except OSError as error:
        raise ConfigurationError(f"--out {out} cannot be written: {error}. Name another folder") from error
    return comparison


def _rates(texts: Sequence[str], problems: list[str]) -> list[int]:
    rates = []
    for text in texts:
        try:
            rates.append(parse_link_rate(text))
        except ConfigurationError as error:
            problems += error.problems
    return rates


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
    """A folder holds one comparison: runs under other conditions do not belong beside it."""
    file, wanted = comparison.out / SETTINGS_FILE, comparison.settings()
    try:
        if not os.path.lexists(file):
            used = comparison.out.exists() and (not comparison.out.is_dir() or any(comparison.out.iterdir()))
            return (
                [f"--out {comparison.out} is in use: name a folder that is empty or holds a comparison"] if used else []
            )
        there = read_record(file).content
    except (OSError, DataError) as error:
        return [f"--out {comparison.out} cannot be read: {error}"]
    differing = [
        f"{name} {reprlib.repr(there.get(name))} there, {value} here"
        for name, value in wanted.items()
        if there.get(name) != value
    ]
    if not differing:
        return []
    return [f"--out {comparison.out} holds another comparison ({'; '.join(differing)}): name another folder"]


def _parser() -> argparse.ArgumentParser:
    lab = LabConfig()
    parser = argparse.ArgumentParser(
        prog="abtrain compare",
        description="Trains a task by several recipes on an emulated cluster, under the same conditions, and writes a "
        "report. Needs root on Linux.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help="RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE")
    parser.add_argument("--task", default="digits-mlp", help=f"{', '.join(TASKS)} (default %(default)s)")
    parser.add_argument("--nodes", type=int, default=lab.nodes, help="hosts (default %(default)s)")
    parser.add_argument("--rate", default="100mbit", help="of every link (default %(default)s)")
    parser.add_argument("--more-rates", default="", help="rates at which seed 0 is run too: 20mbit,1gbit")
    parser.add_argument("--workers-per-node", type=int, default=lab.workers_per_node, help="default %(default)s")
    parser.add_argument("--seeds", type=int, default=1, help="runs of every recipe (default %(default)s)")
    parser.add_argument("--steps", type=int, help="of each run; by default the task's")
    parser.add_argument("--lr", action="append", default=[], metavar="RECIPE=VALUE", help="by default the task's")
    parser.add_argument("--out", type=Path, help="folder for everything (default runs/compare-TASK)")
    parser.add_argument("--overwrite", action="store_true", help="replace runs in it that have other settings")
    return parser
