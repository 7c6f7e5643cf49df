"""Beyond the paper: factors kept from round to round, all trained by all groups."""

from __future__ import annotations

from typing import Any

from abtrain.errors import ConfigurationError
from abtrain.recipes.building_blocks import are_counts, at_local_lr, full_phase, preset, rank_rule_of, whole_rounds
from abtrain.recipes.factoring import Factoring, RankRule
from abtrain.recipes.merges import Mean, MergeRule, Outer
from abtrain.recipes.numbers import whole_number_problems
from abtrain.recipes.phase import Phase
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import WeightSync

AB_OUTER = {"keep_dense_if_larger": True, "optimizer_state": "auto"}
"""What both recipes here change of `Factoring`'s defaults."""
FACTOR_LR = 2.0
"""Of `ab_outer`, with a preconditioner. Measured: benchmarks/merges.md."""
LOCAL_LR = 2.0
"""Of `ab_local`: the root of four groups, by as much as a batch of one has more noise than that of all together."""


def ab_outer(
    total_steps: int,
    name: str = "ab_outer",
    *,
    every: int = 20,
    outer_lr: float = 0.9,
    outer_momentum: float = 0.8,
    wire: str = "auto",
    delay: int = 0,
    fragments: int = 1,
    warmup_steps: int | None = None,
    warmup_every: int | None = None,
    warmup_wire: str | None = None,
    warmup_delay: int = 0,
    refactor_every: int = 0,
    rebound_steps: int = 0,
    rebound_every: int | None = None,
    lr_rebound_steps: int | None = None,
    sigma_cutoff: float = 0.22,
    damping: float = 0.1,
    factor_lr: float | None = None,
    local_lr: float = 1.0,
    rank_rule: RankRule | str | None = None,
    **factoring: Any,
) -> Recipe:
    """Beyond the paper: full-rank local warm-up, then all groups train both factors, with outer Nesterov merges.

    Rounds keep the inner optimizer's state, and merges keep the outer one's.

    Args:
        total_steps: of the run.
        name: of the recipe.
        every: steps between merges.
        outer_lr: learning rate of the outer optimizer.
        outer_momentum: its momentum.
        wire: how merges are sent (see `abtrain.recipes.sync.WeightSync`).
        delay: steps that a merge of factors is hidden behind.
        fragments: parts of the model that merge in turns, while it is factored.
        warmup_steps: full-rank steps with outer merges; default 20 % of all, in whole rounds.
        warmup_every: steps between merges there; default `every`; 0: gradients are averaged at every step.
        warmup_wire: how merges are sent there; default `wire`.
        warmup_delay: steps that a merge is hidden behind there.
        refactor_every: rounds after which weights are factored anew, so that ranks can fall; 0: factor once.
        rebound_steps: full-rank steps before weights are factored anew.
        rebound_every: steps between merges there; default `every`; 0: gradients are averaged at every step.
        lr_rebound_steps: steps over which the learning rate climbs back after factoring; default `every`.
        sigma_cutoff: singular values below this share of the largest are dropped, unless that is an outlier
            (`SigmaCutoff(outliers=False)`).
        damping: of the preconditioner of the factors' steps; 0: no preconditioner.
        factor_lr: multiplies preconditioned steps; default 2, which suits optimizers that normalize gradients (Adam).
        local_lr: multiplies the learning rate between merges (see `abtrain.recipes.phase.Phase`).
        rank_rule: in place of `SigmaCutoff(sigma_cutoff)`: a rule, or its name such as `energy:0.95`.
        factoring: the other settings of `abtrain.recipes.factoring.Factoring`.

    Raises:
        ConfigurationError: values that cannot be; `rebound_steps` without `refactor_every`.
    """
    # Without momentum the outer optimizer is a mean, and keeps nothing.
    merge: MergeRule = Mean() if (outer_lr, outer_momentum) == (1, 0) else Outer(outer_lr, outer_momentum)
    sync = WeightSync(every, merge, wire, delay, fragments)
    if warmup_steps is None:
        warmup_steps = whole_rounds(total_steps, every)
    warmup_every = every if warmup_every is None else warmup_every
    prologue = full_phase("warmup", warmup_steps, warmup_every, warmup_wire or wire, merge, warmup_delay)
    rebound_every = every if rebound_every is None else rebound_every
    rebound = _rebound(full_phase("rebound", rebound_steps, rebound_every, wire, merge), refactor_every)
    settings = Factoring(rank_rule_of(rank_rule, sigma_cutoff, outliers=False), **{**AB_OUTER, **factoring})
    steps = _factored_steps(total_steps, prologue, every, refactor_every)
    if factor_lr is None:
        factor_lr = FACTOR_LR if damping else 1.0
    factors = Phase("factors", steps, weights="factored", sync=sync, damping=damping, factor_lr=factor_lr)
    prologue, cycle = at_local_lr(prologue, local_lr), at_local_lr((factors, *rebound), local_lr)
    return Recipe(name, total_steps, prologue, cycle, settings, every if lr_rebound_steps is None else lr_rebound_steps)


ab_local = preset(
    ab_outer,
    "ab_local",
    """Beyond the paper: `ab_outer` with plain means after short rounds, for transformers from scratch.

    Outer momentum pays after many rounds, and where workers' changes agree; early in the training of a transformer
    they do not. Means of short rounds in 1.8 bits cost as much payload as outer merges of long ones in more bits.

    It takes the options of `ab_outer` except those of the outer optimizer. `local_lr` lengthens the steps between
    merges, because a small batch alone has more noise to divide by. Its default suits four groups, and optimizers that
    divide by the noise of gradients, as Adam does.
    """,
    fixed={"outer_lr": 1.0, "outer_momentum": 0.0},
    every=6,
    wire="ternary",
    factor_lr=1.0,
    local_lr=LOCAL_LR,
)


def _rebound(phases: tuple[Phase, ...], refactor_every: int) -> tuple[Phase, ...]:
    """The full-rank phase before weights are factored again, if that happens.

    Raises:
        ConfigurationError: there is a phase, but weights are factored once.
    """
    if phases and not refactor_every:
        raise ConfigurationError(
            f"rebound_steps={phases[0].steps} come before weights are factored anew, and refactor_every=0 factors them "
            "once: give refactor_every, or leave rebound_steps out"
        )
    return phases


def _factored_steps(total_steps: int, prologue: tuple[Phase, ...], every: int, refactor_every: int) -> int:
    """Length of the factored phase: so many rounds, or all steps that the prologue leaves.

    Raises:
        ConfigurationError: no number of rounds.
    """
    found = whole_number_problems("refactor_every", refactor_every, least=0)
    if found:
        raise ConfigurationError(found)
    before = [phase.steps for phase in prologue]
    if refactor_every and are_counts(every):
        return refactor_every * every
    if are_counts(total_steps, *before) and sum(before) < total_steps:
        return total_steps - sum(before)
    return total_steps
