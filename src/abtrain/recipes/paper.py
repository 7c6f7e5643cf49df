"""Defines the paper's recipes: Algorithm 1 with groups and without."""

from __future__ import annotations

from typing import Annotated, Any

from abtrain.recipes import shared
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.options import only_declared
from abtrain.recipes.phase import Phase
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.shared import WARMUP_SHARE, full_phase, given_or, merge_rule, preset, rank_rule_of, share_of
from abtrain.recipes.sync import GradientSync, Sync, Trains, WeightSync

AB_SHARE = 1 / 30
"""The length of a group phase, in which groups train factors, as a share of all steps (the paper's guideline)."""
REBOUND_SHARE = 0.25
"""The length of the full-rank rebound phase as a share of the group phase."""
LR_REBOUND_SHARE = 0.5
"""The length of the learning-rate warm-up after each change of shapes, as a share of the group phase."""

_GroupEvery = Annotated[
    int | None,
    "Steps between merges in a group phase; by default one merge, at its end; 0 (with trains=b): gradients are "
    "averaged over all workers at every step.",
]
_Trains = Annotated[
    Trains,
    "a_or_b (the paper's): each group trains A or B; b: all groups train B; a_then_b: all groups train A in one round "
    "and B in the next, so the mean of the products A B equals the product of the mean factors.",
]


@only_declared
def ab(
    total_steps: int,
    name: str = "ab",
    *,
    sigma_cutoff: Annotated[float, "Singular values below this share of the largest are dropped."] = 0.15,
    warmup_steps: Annotated[int | None, "Full-rank steps at the start; by default 20 % of the run."] = None,
    warmup_every: shared.PhaseEvery = 0,
    ab_steps: Annotated[int | None, "Steps of a group phase; by default 3.33 % of the run."] = None,
    every: _GroupEvery = None,
    trains: _Trains = "a_or_b",
    merge: shared.Merge = "mean",
    temperature: shared.Temperature = 0.1,
    wire: shared.Wire = "fp32",
    rebound_steps: Annotated[int | None, "Full-rank steps after a group phase; by default `ab_steps` / 4."] = None,
    rebound_every: shared.PhaseEvery = 0,
    lr_rebound_steps: Annotated[int | None, "Learning-rate warm-up steps per phase; by default `ab_steps` / 2."] = None,
    outer_device: shared.OuterDevice = None,
    rank_rule: shared.Rule = None,
    **factoring: Any,
) -> Recipe:
    """AB-training, Algorithm 1 of the paper: half of the groups train the factors A, and the others B.

    Then all workers average their weights, and train at full rank for some steps. `abtrain recipes ab` lists the
    options. `factoring` takes the other fields of `Factoring`.

    Raises:
        ConfigurationError: settings are invalid; one message for each problem.
    """
    ab_steps = given_or(ab_steps, share_of(total_steps, AB_SHARE))
    warmup_steps = given_or(warmup_steps, share_of(total_steps, WARMUP_SHARE, least=0))
    rebound_steps = given_or(rebound_steps, share_of(ab_steps, REBOUND_SHARE))
    lr_rebound_steps = given_or(lr_rebound_steps, share_of(ab_steps, LR_REBOUND_SHARE, least=0))
    rule = merge_rule(merge, temperature)
    settings = Factoring(rank_rule_of(rank_rule, sigma_cutoff), **factoring)
    together = type(every) is int and every == 0
    sync: Sync = GradientSync() if together else WeightSync(given_or(every, ab_steps), rule, wire)
    low_rank = Phase("low_rank" if together else "group", ab_steps, weights="factored", trains=trains, sync=sync)
    prologue = full_phase("warmup", warmup_steps, warmup_every, wire)
    cycle = (low_rank, *full_phase("rebound", rebound_steps, rebound_every, wire))
    return Recipe(name, total_steps, prologue, cycle, settings, lr_rebound_steps, outer_device)


ab_no_groups = preset(
    ab,
    "ab_no_groups",
    """The paper's "AB - No Groups": the schedule of `ab`, but all workers train B together, in data parallel.

    Takes the options of `ab` except those for groups. `wire` is the format of merges in the warm-up and the rebound.
    """,
    fixed={"every": 0, "trains": "b", "merge": "mean", "temperature": 0.1},
)
