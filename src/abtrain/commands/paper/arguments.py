"""Parses and validates the arguments of `abtrain paper`. Does not import torch, which would delay `--help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abtrain.commands.command_line import Parser, whole_number
from abtrain.commands.page import missing_packages
from abtrain.commands.paper.experiments import FIGURES, METHODS, SCALES, TABLES, Scale
from abtrain.commands.paper.studies import STUDIES
from abtrain.errors import ConfigurationError, nearest

LAUNCHER = "torchrun --nnodes {nodes} --nproc-per-node {workers_per_node}"
"""The default command that starts a run at full scale. `-m abtrain train` and its arguments are appended to it."""
ECR, HPO = "ecr", "hpo"
EXPERIMENTS = (*TABLES, *FIGURES, HPO, ECR, *STUDIES)
_EXAMPLES = """\
A table runs its experiments. A figure shows the runs of tables, and runs missing ones with --run:
  abtrain paper table2-local --scale tiny
  abtrain paper fig2 --scale tiny
  abtrain paper table2-local --scale full --dry-run
  abtrain paper ecr --out FOLDER
  abtrain paper table1 --scale full --launcher \\
    "srun -N {nodes} my-torchrun --nproc-per-node {workers_per_node}"
  abtrain paper large-batch --nodes 64 --seeds 1

Finished runs are not repeated: the same command continues where it stopped. A run with other settings in the folder is
replaced only with --overwrite. The tiny scale takes minutes per run on two cores. The full scale needs the cluster on
which the launcher starts workers."""


@dataclass(frozen=True)
class PaperRequest:
    """The experiment and the settings that a command line requests.

    Attributes:
        experiment: the name of the experiment, one of EXPERIMENTS.
        scale: the size of the experiment, tiny or full.
        seeds: the number of seeds. Every cell of a table has one run for each seed.
        nodes: the numbers of nodes to use, in ascending order. If it is empty, the experiment determines them.
        methods: the methods to run, some of METHODS; empty for all.
        out: the folder into which all files are written.
        data: the folder with the data; None for its default place.
        launcher: the command line that starts the workers of a run at full scale.
        dry_run: whether to print the planned runs without executing them.
        write: whether to write the settings of runs at full scale and print their commands, without executing them.
        arithmetic: whether to only evaluate the paper's formulas.
        run: whether runs that a figure shows are executed if they are missing.
        trials: the number of trials of the hyperparameter search, for each recipe.
        draws: whether to also draw the figure of the experiment `ecr` and write it to `out`.
        overwrite: whether runs with other settings are replaced.
    """

    experiment: str
    scale: Scale
    seeds: int
    nodes: tuple[int, ...]
    methods: tuple[str, ...]
    out: Path
    data: Path | None
    launcher: str
    dry_run: bool
    write: bool
    arithmetic: bool
    run: bool
    trials: int
    draws: bool
    overwrite: bool


def parse_arguments(arguments: Sequence[str]) -> PaperRequest:
    """Parses and validates a command line.

    Raises:
        ConfigurationError: the arguments are invalid, or a package is missing. The error lists all problems.
        SystemExit: --help, or an unknown option.
    """
    given = parser().read(arguments)
    problems: list[str] = []
    nodes = _nodes(given.nodes, problems)
    methods = tuple(filter(None, given.methods.split(";")))
    problems += _problems(given, methods)
    if not (given.arithmetic or given.dry_run or given.write or (given.experiment == ECR and given.out is None)):
        problems += missing_packages()
    if problems:
        raise ConfigurationError(problems)
    return PaperRequest(
        experiment=given.experiment,
        scale=SCALES[given.scale],
        seeds=given.seeds,
        nodes=nodes,
        methods=methods,
        out=given.out or Path("runs") / f"paper-{given.scale}",
        data=given.data,
        launcher=given.launcher,
        dry_run=given.dry_run,
        write=given.write,
        arithmetic=given.arithmetic,
        run=given.run,
        trials=given.trials,
        draws=given.out is not None,
        overwrite=given.overwrite,
    )


def _problems(given: argparse.Namespace, methods: Sequence[str]) -> list[str]:
    """Returns a message for each problem of a command line, except for nodes and missing packages."""
    problems = []
    if given.experiment not in EXPERIMENTS:
        problems.append(f"unknown experiment {given.experiment!r}: {nearest(given.experiment, EXPERIMENTS)}")
    for name in ("seeds", "trials"):
        if getattr(given, name) < 1:
            problems.append(f"--{name} {getattr(given, name)} is too small: use at least 1")
    if given.arithmetic and not given.experiment.startswith("table2"):
        problems.append(f"--arithmetic is for table2-local and table2-global, not {given.experiment}: leave it out")
    if given.experiment in STUDIES and given.scale != "tiny":
        problems.append(f"{given.experiment} has only the tiny scale: leave out --scale {given.scale}")
    ignored = {"table1": ("nodes",), HPO: ("nodes", "methods"), ECR: ("nodes", "methods")}.get(given.experiment, ())
    problems += [
        f"--{name} has no effect on {given.experiment}: leave it out" for name in ignored if getattr(given, name)
    ]
    labels = [label for study in STUDIES.values() for label in study.variants] + list(METHODS)
    problems += [f"unknown method {m!r}: {nearest(m, METHODS)}" for m in methods if m not in labels]
    try:
        given.launcher.format(nodes=1, workers_per_node=1)
    except (KeyError, IndexError, ValueError) as error:
        problems.append(
            f"--launcher {given.launcher!r} is not a valid template ({error}): use no placeholders but {{nodes}} and "
            "{workers_per_node}"
        )
    if given.experiment == HPO and (given.dry_run or given.write):
        problems.append("hpo plans each run from the results of earlier runs: leave out --dry-run and --write")
    if given.write and given.scale == "tiny":
        problems.append("--write is for runs that a launcher starts: add --scale full")
    return problems


def _nodes(text: str, problems: list[str]) -> tuple[int, ...]:
    found = []
    for part in filter(None, text.split(",")):
        if not part.isdecimal() or int(part) < 1:
            problems.append(f"--nodes {part!r} is not a whole number of at least 1: use numbers such as 4,8,16")
            continue
        found.append(int(part))
    return tuple(sorted(set(found)))


def parser() -> Parser:
    """Returns the parser of `abtrain paper`."""
    found = Parser(
        "paper",
        "EXPERIMENT [OPTIONS]",
        "Run the paper's experiments (arXiv 2405.01067), and compare the results with the paper's.",
        _EXAMPLES,
    )
    found.add_argument("experiment", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    runs = found.add_argument_group("runs")
    runs.add_argument(
        "--scale", choices=sorted(SCALES), default="tiny", help="size of the experiment (default %(default)s)"
    )
    runs.add_argument("--seeds", type=whole_number, default=3, metavar="N", help="runs of each cell (default 3)")
    runs.add_argument(
        "--nodes", default="", metavar="N,N", help="numbers of nodes, such as 4,8,16 (default: the experiment's)"
    )
    runs.add_argument("--methods", default="", metavar="M;M", help=f"some of {';'.join(METHODS)} (default: all)")
    runs.add_argument("--trials", type=whole_number, default=40, metavar="N", help="trials of hpo (default 40)")
    runs.add_argument("--data", type=Path, metavar="PATH", help="folder of the data (default: its usual place)")
    runs.add_argument(
        "--launcher",
        default=LAUNCHER,
        metavar="COMMAND",
        help="command that starts runs at full scale (default '%(default)s')",
    )
    instead = found.add_argument_group("what to do")
    instead.add_argument("--run", action="store_true", help="for a figure: execute the runs that are missing")
    instead.add_argument(
        "--dry-run", action="store_true", help="print the planned runs and their traffic without running them"
    )
    instead.add_argument(
        "--write", action="store_true", help="write the settings of all runs at full scale, and print how to start them"
    )
    instead.add_argument(
        "--arithmetic", action="store_true", help="for table2: compare the paper's formula with its values"
    )
    saving = found.add_argument_group("saving")
    saving.add_argument("--out", type=Path, metavar="PATH", help="folder for all files (default runs/paper-SCALE)")
    saving.add_argument("--overwrite", action="store_true", help="replace runs in the folder that have other settings")
    return found
