"""Defines studies of questions that the paper leaves open, with the tiny-scale runs that answer them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from abtrain import recipes
from abtrain.commands.paper.experiments import AB_OUTER, LOCAL_SGD, METHODS, SCALES, Cell, cells
from abtrain.commands.paper.published import AB, DDP

Shown = Literal["bytes", "compression", "batch", "divergence"]


@dataclass(frozen=True)
class Study:
    """A question and the runs that answer it.

    Attributes:
        question: the question of the study as a sentence.
        shown: the quantity on the horizontal axis of the accuracy figure. The study `divergence` has other figures.
        variants: a method for each label, with the options of its recipe that replace those of the tables.
        nodes: the numbers of nodes. Variants have the same global batch on all of them.
        methods: the methods whose runs the study shares with tables.
        tables: the tables that contain the shared runs.
    """

    question: str
    shown: Shown
    variants: Mapping[str, tuple[str, Mapping[str, Any]]]
    nodes: tuple[int, ...] = (4,)
    methods: tuple[str, ...] = (DDP,)
    tables: tuple[str, ...] = ("table2-global",)


_CUTOFFS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5)
STUDIES: dict[str, Study] = {
    "merges": Study(
        "Which merge rule loses least?",
        "bytes",
        {
            "AB, mean": (AB, {}),
            "AB, trained only": (AB, {"merge": "trained_only"}),
            "AB, weighted by loss": (AB, {"merge": "weighted"}),
            "AB, A then B (exact)": (AB, {"trains": "a_then_b"}),
            "outer Nesterov": (AB_OUTER, {}),
        },
    ),
    "rank-rules": Study(
        "Which rule should choose the rank of each layer?",
        "compression",
        {
            f"ab_outer, {rule}": (AB_OUTER, {"rank_rule": rule})
            for rule in (
                "energy:0.8",
                "energy:0.9",
                "energy:0.95",
                "stable:1",
                "stable:2",
                "stable:4",
                "fixed:8",
                "fixed:16",
            )
        }
        | {f"ab_outer, sigma {cutoff}": (AB_OUTER, {"sigma_cutoff": cutoff}) for cutoff in (0.1, 0.22, 0.4)},
    ),
    "ablation": Study(
        "What do low-rank factors add to local training on the same schedule?",
        "batch",
        {},
        nodes=(4, 8, 16),
        methods=(DDP, AB, LOCAL_SGD),
        tables=("table2-local",),
    ),
    "divergence": Study(
        "How far do groups diverge in a phase, and in which layers?",
        "divergence",
        {"AB": (AB, {}), "ab_outer": (AB_OUTER, {})},
        nodes=(4, 16),
        methods=(),
    ),
    "compression": Study(
        "How much accuracy does compression cost?",
        "compression",
        {f"AB, sigma {cutoff}": (AB, {"sigma_cutoff": cutoff}) for cutoff in _CUTOFFS}
        | {f"ab_outer, sigma {cutoff}": (AB_OUTER, {"sigma_cutoff": cutoff}) for cutoff in _CUTOFFS},
    ),
    "large-batch": Study(
        "Where does each method lose accuracy as workers are added?",
        "batch",
        {},
        nodes=(4, 8, 16, 32, 64),
        methods=tuple(METHODS),
        tables=("table2-local", "table2-global"),
    ),
}


def study_cells(name: str, nodes: Sequence[int] = (), methods: Sequence[str] = ()) -> list[Cell]:
    """Returns all cells of a study.

    Args:
        name: the name of the study, a key of STUDIES.
        nodes: the numbers of nodes that replace those of the study.
        methods: the labels of variants, or names of methods, to include; by default all.
    """
    study, scale = STUDIES[name], SCALES["tiny"]
    counts = tuple(nodes or study.nodes)
    shared = [method for method in study.methods if not methods or method in methods]
    found = [cell for table in study.tables if shared for cell in cells(table, scale, counts, shared)]
    for count in counts:
        for label, (method, options) in study.variants.items():
            if not methods or label in methods or method in methods:
                base = cells("table2-global", scale, (count,), (method,))[0]
                found.append(_variant(base, label, options, study.shown == "divergence"))
    return found


def _variant(base: Cell, label: str, options: Mapping[str, Any], divergence: bool) -> Cell:
    """Returns a cell with another label and other options. Without options, it has the same runs as the tables.

    If it measures divergence, it always has its own runs.
    """
    if not options and not divergence:
        return replace(base, method=label)
    name, own = recipes.parse(base.config.recipe)
    config = replace(base.config, recipe=recipes.write(name, {**own, **options}), divergence=divergence)
    return replace(base, method=label, config=config, variant=label)
