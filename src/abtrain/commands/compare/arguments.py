"""Defines the arguments of `abtrain compare`. The module does not import torch, which would delay `--help`."""

from __future__ import annotations

from pathlib import Path

from abtrain.commands.command_line import Parser, whole_number
from abtrain.commands.lab.config import LabConfig

_TASKS = "digits-mlp, fashion-cnn, fashion-vit, pysrc-gpt, or another task of `abtrain train` (default %(default)s)"
_EXAMPLES = """\
A recipe may have options, which `abtrain recipes RECIPE` lists:
  abtrain compare ab_outer "diloco:every=40,wire=int4" --task fashion-cnn
  abtrain compare ab_outer ab --lr ab_outer=4e-3 --lr ab=2e-3

solo, ddp and ddp:wire=bf16 are always included. Finished runs are not repeated: the same command with the same --out
continues where it stopped, also with more recipes, seeds or rates. A run with other settings in the folder is replaced
only with --overwrite."""


def parser() -> Parser:
    """Returns the parser of `abtrain compare`."""
    lab = LabConfig()
    found = Parser(
        "compare",
        "RECIPE [RECIPE ...] [OPTIONS]",
        "Train a task by several recipes on an emulated cluster under the same conditions, and write a report. Needs "
        "root on Linux.",
        _EXAMPLES,
    )
    found.add_argument("recipes", nargs="+", metavar="RECIPE", help="RECIPE or RECIPE:OPTION=VALUE,OPTION=VALUE")
    runs = found.add_argument_group("runs")
    runs.add_argument("--task", default="digits-mlp", metavar="TASK", help=_TASKS)
    runs.add_argument("--steps", type=whole_number, metavar="N", help="steps of each run (default: the task's)")
    runs.add_argument("--seeds", type=whole_number, default=1, metavar="N", help="runs of each recipe (default 1)")
    runs.add_argument(
        "--lr", action="append", default=[], metavar="RECIPE=X", help="learning rate (default: the task's)"
    )
    cluster = found.add_argument_group("cluster")
    cluster.add_argument(
        "--nodes", type=whole_number, default=lab.nodes, metavar="N", help=f"hosts (default {lab.nodes})"
    )
    cluster.add_argument(
        "--workers-per-node",
        type=whole_number,
        default=lab.workers_per_node,
        metavar="N",
        help="processes on each host (default %(default)s)",
    )
    cluster.add_argument("--rate", default="100mbit", metavar="RATE", help="rate of every link (default %(default)s)")
    cluster.add_argument(
        "--more-rates", default="", metavar="RATES", help="further rates for runs with seed 0, such as 20mbit,1gbit"
    )
    saving = found.add_argument_group("saving")
    saving.add_argument("--out", type=Path, metavar="PATH", help="folder for all files (default runs/compare-TASK)")
    saving.add_argument("--overwrite", action="store_true", help="replace runs in the folder that have other settings")
    return found
