"""The arguments of `abtrain paper`, and their validation."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from abtrain.commands.page import missing_packages
from abtrain.commands.paper.experiments import FIGURES, METHODS, SCALES, TABLES, Scale
from abtrain.commands.paper.runs import LAUNCHER
from abtrain.commands.paper.studies import STUDIES
from abtrain.errors import ConfigurationError, nearest

ECR, HPO = "ecr", "hpo"
EXPERIMENTS = (*TABLES, *FIGURES, HPO, ECR, *STUDIES)
_EXAMPLES = """\
tables run their experiments, figures draw what the tables have run (or, with --run, run it too):
  abtrain paper table2-local --scale tiny
  abtrain paper fig2 --scale tiny
  abtrain paper table2-local --scale full --dry-run
  abtrain paper ecr [--out FOLDER, for its figure]
  abtrain paper table1 --scale full --launcher "srun -N {nodes} my-torchrun --nproc-per-node {workers_per_node}"
  abtrain paper large-batch --nodes 64 --seeds 1

What is done is not run again: the same command goes on where it was stopped. Runs of other settings are refused unless
--overwrite gives them up. The small scale takes minutes a run on
two cores; the full one needs the cluster that its launcher starts on."""


@dataclass(frozen=True)
class PaperRequest:
    """The experiments and settings that a command line asks for.

    Attributes:
        experiment: one of EXPERIMENTS.
        scale: how large.
        seeds: runs of each cell.
        nodes: in place of the scale's own; empty: those.
        methods: some of METHODS; empty: all.
        out: folder for everything.
        data: folder with the data; by default its usual place.
        launcher: starts the workers of a real run.
        dry_run: only say what would be run.
        write: only write the settings of real runs, and say how each is started.
        arithmetic: only the paper's formulas.
        run: a figure may run what it lacks.
        trials: of the search.
        draws: whether arithmetic is to be drawn into `out` too.
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
        ConfigurationError: all that is wrong.
        SystemExit: --help, or an option that there is not.
    """
    given = _parser().parse_args(arguments)
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
    """Returns the problems of a command line, nodes and packages aside."""
    problems = []
    if given.experiment not in EXPERIMENTS:
        problems.append(f"unknown experiment {given.experiment!r}: {nearest(given.experiment, EXPERIMENTS)}")
    for name in ("seeds", "trials"):
        if getattr(given, name) < 1:
            problems.append(f"--{name} {getattr(given, name)} is too small: use at least 1")
    if given.arithmetic and not given.experiment.startswith("table2"):
        problems.append(f"--arithmetic is about table2-local and table2-global, not {given.experiment}: leave it out")
    if given.experiment in STUDIES and given.scale != "tiny":
        problems.append(f"{given.experiment} is a study of the small scale: leave out --scale {given.scale}")
    labels = [label for study in STUDIES.values() for label in study.variants] + list(METHODS)
    problems += [f"unknown method {m!r}: {nearest(m, METHODS)}" for m in methods if m not in labels]
    try:
        given.launcher.format(nodes=1, workers_per_node=1)
    except (KeyError, IndexError, ValueError) as error:
        problems.append(
            f"--launcher {given.launcher!r} cannot be filled in ({error}): use {{nodes}}, {{workers_per_node}}"
        )
    if given.experiment == HPO and (given.dry_run or given.write):
        problems.append("hpo chooses its runs as it goes: leave out --dry-run and --write")
    if given.write and given.scale == "tiny":
        problems.append("--write is for runs that a launcher starts: add --scale full")
    return problems


def _nodes(text: str, problems: list[str]) -> tuple[int, ...]:
    found = []
    for part in filter(None, text.split(",")):
        if not part.isdecimal() or int(part) < 1:
            problems.append(f"--nodes {part!r} is not a whole number of at least 1: write them as 4,8,16")
            continue
        found.append(int(part))
    return tuple(found)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="abtrain paper",
        description="Runs the paper's experiments (arXiv 2405.01067), and sets the outcome beside its values.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", metavar="EXPERIMENT", help=", ".join(EXPERIMENTS))
    parser.add_argument("--scale", choices=sorted(SCALES), default="tiny", help="default %(default)s")
    parser.add_argument("--seeds", type=int, default=3, help="runs of every cell (default %(default)s)")
    parser.add_argument("--nodes", default="", help="such as 4,8,16; by default the experiment's")
    parser.add_argument("--methods", default="", help=f"some of: {';'.join(METHODS)}")
    parser.add_argument("--out", type=Path, help="folder for everything (default runs/paper-SCALE)")
    parser.add_argument("--overwrite", action="store_true", help="replace runs in it that have other settings")
    parser.add_argument("--data", type=Path, help="folder with the task's data; by default its usual place")
    parser.add_argument("--launcher", default=LAUNCHER, help="starts real runs (default '%(default)s')")
    parser.add_argument("--dry-run", action="store_true", help="say what would be run and sent, and run nothing")
    parser.add_argument(
        "--write", action="store_true", help="write the settings of all real runs, and print how to start them"
    )
    parser.add_argument("--arithmetic", action="store_true", help="of table2: the paper's formula beside its values")
    parser.add_argument("--run", action="store_true", help="of a figure: run what it lacks")
    parser.add_argument("--trials", type=int, default=40, help="of the search (default %(default)s)")
    return parser
