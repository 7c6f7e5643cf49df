"""The paper's recipes: Algorithm 1 with groups and without."""

from __future__ import annotations

from typing import Any

from abtrain.recipes.building_blocks import (
    WARMUP_SHARE,
    full_phase,
    merge_rule,
    preset,
    rank_rule_of,
    share_of,
)
from abtrain.recipes.factoring import Factoring, RankRule
from abtrain.recipes.merges import MergeRule
from abtrain.recipes.phase import Phase
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import GradientSync, Sync, Trains, WeightSync

AB_SHARE = 1 / 30
"""Steps of one group phase over all steps: 3.33 % in the guideline."""
REBOUND_SHARE = 0.25
"""Full-rank rebound over the group phase."""
LR_REBOUND_SHARE = 0.5
"""LR rebound over the group phase."""


def ab(
    total_steps: int,
    name: str = "ab",
    *,
    sigma_cutoff: float = 0.15,
    warmup_steps: int | None = None,
    warmup_every: int = 0,
    ab_steps: int | None = None,
    every: int | None = None,
    trains: Trains = "a_or_b",
    merge: MergeRule | str = "mean",
    temperature: float = 0.1,
    wire: str = "fp32",
    rebound_steps: int | None = None,
    rebound_every: int = 0,
    lr_rebound_steps: int | None = None,
    rank_rule: RankRule | str | None = None,
    **factoring: Any,
) -> Recipe:
    """AB-training, Algorithm 1 of the paper: half of the groups train A, the others B, then all average and recover.

    Args:
        total_steps: of the run.
        name: of the recipe.
        sigma_cutoff: singular values below this share of the largest are dropped.
        warmup_steps: full-rank steps at the start; default 20 % of all.
        warmup_every: steps between merges there; 0, as in the paper: gradients are averaged at every step.
        ab_steps: steps of a group phase; default 3.33 % of all.
        every: steps between merges in a group phase; default one merge, at its end; 0: gradients are averaged over all
            workers at every step, and all train the same factor.
        trains: one factor by the group's role (the paper), or the same factor in all groups, another in each round
            (`a_then_b`): then the average of the products is the product of the averages.
        merge: a rule of `abtrain.recipes.merges`, or its name: mean (the paper), trained_only or weighted.
        temperature: of `weighted`, in the units of the loss.
        wire: how merges are sent (see `abtrain.recipes.sync.WeightSync`).
        rebound_steps: full-rank steps after each group phase; default a quarter of `ab_steps`.
        rebound_every: steps between merges there; 0, as in the paper: gradients are averaged at every step.
        lr_rebound_steps: steps over which the learning rate climbs back; default half of `ab_steps`.
        rank_rule: in place of `SigmaCutoff(sigma_cutoff)`: a rule, or its name such as `energy:0.95`.
        factoring: the other settings of `abtrain.recipes.factoring.Factoring`.
    """
    if ab_steps is None:
        ab_steps = share_of(total_steps, AB_SHARE)
    if warmup_steps is None:
        warmup_steps = share_of(total_steps, WARMUP_SHARE, least=0)
    if rebound_steps is None:
        rebound_steps = share_of(ab_steps, REBOUND_SHARE)
    if lr_rebound_steps is None:
        lr_rebound_steps = share_of(ab_steps, LR_REBOUND_SHARE, least=0)
    rule = merge_rule(merge, temperature)
    settings = Factoring(rank_rule_of(rank_rule, sigma_cutoff), **factoring)
    together = type(every) is int and every == 0
    sync: Sync = GradientSync() if together else WeightSync(ab_steps if every is None else every, rule, wire)
    low_rank = Phase("low_rank" if together else "group", ab_steps, weights="factored", trains=trains, sync=sync)
    prologue = full_phase("warmup", warmup_steps, warmup_every, wire)
    cycle = (low_rank, *full_phase("rebound", rebound_steps, rebound_every, wire))
    return Recipe(name, total_steps, prologue, cycle, settings, lr_rebound_steps)


ab_no_groups = preset(
    ab,
    "ab_no_groups",
    """The paper's "AB - No Groups": the schedule of `ab`, but all workers train B together, in data parallel.

    It takes the options of `ab` except those of groups. `wire` is that of merges in warm-up and rebound.
    """,
    fixed={"every": 0, "trains": "b", "merge": "mean", "temperature": 0.1},
)
