"""Tables that need no run: the paper's formulas beside its values, and what the experiments would send."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

import torch

from abtrain.comm.topology import Topology
from abtrain.commands.page import Table
from abtrain.commands.paper.arithmetic import ecr_rows, epoch_seconds, iterations, scaled_traffic
from abtrain.commands.paper.experiments import AB_OUTER, SCALES, Cell, Scaling, cells
from abtrain.commands.paper.published import (
    AB,
    DDP,
    ITERATIONS_4K,
    NO_GROUPS,
    TABLE1,
    TABLE2_GLOBAL,
    TABLE2_LOCAL,
    PaperCell,
    Value,
)
from abtrain.commands.paper.runs import LAUNCHER
from abtrain.commands.plan.payload import payload, predict
from abtrain.commands.plan.recipe_words import phases_in_words
from abtrain.commands.plan.shapes import ModelShapes, ranks_for, shapes_of
from abtrain.commands.tasks.task import TASKS
from abtrain.commands.train.config import group_size_of, recipe_of
from abtrain.commands.units import human_bytes
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.recipe import Recipe

_ASSUMED = 4.0
"""Compression where the paper has none."""


def ecr_table() -> Table:
    """Eq. 4 for each row of Table I, beside the paper's value."""
    lines = []
    for row in ecr_rows():
        computed, difference = row.computed, row.difference
        lines.append(
            (
                row.method.model,
                row.method.name,
                f"{row.method.compression:.2f}:1",
                f"{row.method.ecr:.2f}",
                "-" if computed is None else f"{computed:.2f}",
                "-" if difference is None else f"{difference:+.2f}",
                "the paper's" if row.reached else row.remark,
            )
        )
    note = (
        "ECR in per cent, 100 - F - L c with F = 25, L = 75 and c the inverse of the compression. For AB, groups that "
        "train alone send nothing: L is 0, and F is the share of steps in full-rank data parallel training."
    )
    header = ("model", "method", "compression", "paper", "eq. 4", "differs by", "remark")
    return Table("Estimated communication reduction (eq. 4, Table I)", header, tuple(lines), note)


def traffic_table(scaling: Scaling) -> Table:
    """Scaled traffic by the caption of Table II, beside the paper's value."""
    published = TABLE2_LOCAL if scaling == "local" else TABLE2_GLOBAL
    plan = {(c.model, c.method, c.nodes): c for c in cells(f"table2-{scaling}", SCALES["full"])}
    shares = {key: _share(plan[key], plan[(key[0], DDP, key[2])]) for key in published}
    lines = [_traffic_line(key, there, scaling, plan[key], shares[key]) for key, there in published.items()]
    note = (
        "Scaled traffic in GB/s: 4 GPUs x float32 parameters x steps of an epoch / (53.84 % x seconds of an epoch), at "
        "most 25; 150 epochs; 300 steps an epoch at a global batch of 4,096 (Section IV.D). The factor of 4 is not in "
        "the caption: without it, no row comes out. AB and AB - No Groups: times the share of DDP's bytes that the "
        "guideline's schedule sends at the paper's compression. Without groups that is B alone; the paper's values for "
        "ViT B/16 are those of A and B together, F + (1 - F) / compression. Time is the job's own. In the row of ViT "
        "B/16, DDP, 4 nodes, constant local batch, it varies by 12 % while traffic varies by 1 %, so that the one does "
        "not give the other; with the 224.97 minutes of the same job in the other half of the table it would be 8.58. "
        "ResNet-50's traffic under DDP cannot be reached from the formula: the paper's is higher everywhere, by 20 "
        "to 60 %."
    )
    header = ("model", "method", "nodes", "minutes", "bytes of DDP", "paper", "formula", "differs by")
    return Table(f"Scaled traffic, constant {scaling} batch (Table II)", header, tuple(lines), note)


def _traffic_line(
    key: tuple[str, str, int], there: PaperCell, scaling: Scaling, cell: Cell, share: float
) -> tuple[str, ...]:
    model, method, nodes = key
    if there.traffic is None or there.minutes is None:
        return (model, method, str(nodes), "-", f"{100 * share:.1f} %", "-", "-", "not legible in our copy")
    syncs = iterations(nodes) if scaling == "local" else float(ITERATIONS_4K)
    value = scaled_traffic(_model_numel(cell), syncs, epoch_seconds(there.minutes.mean), share)
    return (
        model,
        method,
        str(nodes),
        _text(there.minutes),
        f"{100 * share:.1f} %",
        _text(there.traffic),
        f"{value:.2f}",
        f"{100 * (value / there.traffic.mean - 1):+.1f} %",
    )


def _text(value: Value) -> str:
    return f"{value.mean:.2f} ± {value.std:.2f}"


def plan_tables(chosen: Sequence[Cell], seeds: int) -> list[Table]:
    """Lists the runs of an experiment and their payload, without running it."""
    lines = []
    for cell in chosen:
        sent, numel = _sent(cell), _model_numel(cell)
        steps = cell.config.steps or 0
        lines.append(
            (
                cell.model,
                cell.method,
                str(cell.nodes),
                str(cell.config.workers),
                f"{cell.global_batch:,}",
                f"{steps:,}",
                human_bytes(sent / max(steps, 1)),
                human_bytes(sent),
                f"{100 * sent / (4 * numel * steps):.2f} %",
            )
        )
    note = (
        f"{len(lines)} cells, {seeds} seeds each. Bytes are those that a worker hands to collectives between nodes, at "
        f"the paper's compression in the same place ({_ASSUMED:g} : 1 where it has none). Started by `{LAUNCHER}`."
    )
    header = ("model", "method", "nodes", "ranks", "batch", "steps", "bytes a step", "bytes a run", "of DDP")
    return [Table("What would be run", header, tuple(lines), note), _phase_table(chosen)]


def _phase_table(chosen: Iterable[Cell]) -> Table:
    """The phases of each method, where it is trained on the fewest nodes."""
    first: dict[tuple[str, str], Cell] = {}
    for cell in chosen:
        first.setdefault((cell.model, cell.method), cell)
    lines = [
        (cell.model, cell.method, str(cell.nodes), phase)
        for cell in first.values()
        for phase in phases_in_words(_recipe(cell))
    ]
    return Table(
        "Phases", ("model", "method", "nodes", "phase"), tuple(lines), "On the fewest nodes of the experiment."
    )


def _recipe(cell: Cell) -> Recipe:
    return recipe_of(cell.config)


def _shapes(cell: Cell, recipe: Recipe) -> ModelShapes:
    return _task_shapes(cell.config.task, recipe.factoring)


@cache
def _task_shapes(task: str, factoring: Factoring | None) -> ModelShapes:
    """Building a large model takes a while, also without its storage."""
    with torch.device("meta"):
        return shapes_of(TASKS[task].model(), factoring)


def _model_numel(cell: Cell) -> int:
    return _shapes(cell, _recipe(cell)).numel


def _sent(cell: Cell) -> float:
    """Bytes between nodes of a worker, in a whole run."""
    recipe = _recipe(cell)
    shapes = _shapes(cell, recipe)
    ranks = ranks_for(shapes, _compression(cell)) if recipe.factored else {}
    topology = Topology(cell.config.workers, group_size_of(cell.config))
    return float(payload(predict(recipe, shapes, topology, ranks), topology)["between_groups"])


def _share(cell: Cell, baseline: Cell) -> float:
    return _sent(cell) / _sent(baseline)


def _compression(cell: Cell) -> float:
    """The paper's, of the same place; of AB for `ab_outer`, which the paper does not have."""
    method = AB if cell.method == AB_OUTER else cell.method
    table = TABLE2_LOCAL if cell.scaling == "local" else TABLE2_GLOBAL
    for name in (method, NO_GROUPS):
        there = table.get((cell.model, name, cell.nodes))
        if there is not None and there.compression is not None:
            return there.compression
    known = [row.compression for row in TABLE1 if (row.model, row.name) == (cell.model, method)]
    return known[0] if known else _ASSUMED
