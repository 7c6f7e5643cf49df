"""What `abtrain plan` forecasts beside what the lab measured: benchmarks/plan_against_lab.py MS FOLDER/compare.json...

Each file is of one `abtrain compare RECIPE... --nodes N --rate RATE --out FOLDER`. The forecast gets what a user would
measure or guess beforehand: the seconds of a step without communication (the comparison's `solo`, so that workers that
share cores are slow in both), the compression, and the latency of a hop in milliseconds, which `allreduce.py` measures
in the lab (MS). What decompositions take, and what factors and averaging gradients add, is measured here, on an idle
machine, and is longer by as much as a step is where workers share cores. Bytes of starting up, which
`solo` sends too, are none of a recipe's and are taken off what was measured.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from abtrain import recipes
from abtrain.commands.compare.contestants import contestants
from abtrain.commands.plan.advice import Setting
from abtrain.commands.plan.bench import Bench, measure_decompositions
from abtrain.commands.plan.collectives import Cluster, NodeLink
from abtrain.commands.plan.forecast import WorkerSeconds
from abtrain.commands.plan.merge_bench import seconds_of_merge
from abtrain.commands.plan.shapes import shapes_of
from abtrain.commands.runs.result_files import read_record
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.units import format_rate
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.rank_rules import FixedRank


def main() -> None:
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    latency = float(sys.argv[1]) / 1000
    torch.set_num_threads(1)  # as the lab's workers
    print("| hosts | rate | recipe | MB forecast | MB measured | off | s forecast | s measured | off |")
    print("|---|---|---|---|---|---|---|---|---|")
    for file in sys.argv[2:]:
        compared = read_record(Path(file)).content
        for row in compared["rows"]:
            if row["label"] != "solo":
                print(_line(compared["settings"], row, compared["rows"], latency))


@cache
def _bench(task: str) -> tuple[Bench, WorkerSeconds]:
    """Of one process that has a core to itself."""
    with torch.device("meta"):
        shapes = shapes_of(TASKS[task].model(), Factoring(FixedRank(1)))
    bench = Bench(TASKS[task])
    return bench, WorkerSeconds(bench.step(), bench.averaging(), measure_decompositions(shapes), merge=seconds_of_merge)


def _line(settings: dict[str, Any], row: dict[str, Any], rows: list[dict[str, Any]], latency: float) -> str:
    task = settings["task"]
    with torch.device("meta"):
        model = TASKS[task].model()
    solo, (bench, alone) = next(other for other in rows if other["label"] == "solo"), _bench(task)
    step_seconds = solo["seconds"] / settings["steps"]
    slower = max(step_seconds / alone.step, 1.0)

    setting = Setting(
        shapes=lambda factoring: shapes_of(model, factoring),
        compression=row["compression"],
        steps=settings["steps"],
        alone=replace(alone.times(slower), step=step_seconds),
        cluster=Cluster(settings["nodes"], NodeLink(settings["rate"], latency), settings["workers_per_node"]),
        measure_factors=lambda ranks: bench.factors(ranks).times(slower),
    )
    workers = settings["nodes"] * settings["workers_per_node"]
    common = {"task": settings["task"], "steps": settings["steps"], "workers": workers}
    entry = next(found for found in contestants([row["label"]], {}, common) if found.label == row["label"])
    name, options = recipes.parse(entry.config.recipe)
    expected = setting.offer(name, **options).forecast
    measured = row["wire_bytes"] - row["start_bytes"]
    cells = (
        str(settings["nodes"]),
        format_rate(settings["rate"]),
        row["label"],
        f"{expected.wire / 1e6:.2f}",
        f"{measured / 1e6:.2f}",
        f"{expected.wire / measured - 1:+.1%}",
        f"{expected.seconds:.1f}",
        f"{row['seconds']:.1f}",
        f"{expected.seconds / row['seconds'] - 1:+.1%}",
    )
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
