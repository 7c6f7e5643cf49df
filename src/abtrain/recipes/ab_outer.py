"""Beyond the paper: factors kept from round to round, all trained by all groups."""

from __future__ import annotations

from typing import Any, NamedTuple

from abtrain.errors import ConfigurationError
from abtrain.recipes.building_blocks import are_counts, at_local_lr, full_phase, rank_rule_of, until, whole_rounds
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
    *,
    every: int = 20,
    outer_lr: float = 0.9,
    outer_momentum: float = 0.8,
    wire: str = "auto",
    delay: int = 0,
    fragments: int = 1,
    mean_steps: int = 0,
    mean_every: int = 5,
    agreement_below: float = 0.0,
    warmup_steps: int | None = None,
    warmup_every: int | None = None,
    warmup_wire: str | None = None,
    warmup_delay: int = 0,
    drift_below: float = 0.0,
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
        every: steps between merges.
        outer_lr: learning rate of the outer optimizer.
        outer_momentum: its momentum.
        wire: how merges are sent (see `abtrain.recipes.sync.WeightSync`).
        delay: steps that a merge of factors is hidden behind.
        fragments: parts of the model that merge in turns, while it is factored.
        mean_steps: steps at the start in which merges are plain means, before the warm-up.
        mean_every: steps between merges there; 0: gradients are averaged at every step.
        agreement_below: end them as soon as workers agree less than this (see `abtrain.recipes.phase.Until`); 0: never.
        warmup_steps: full-rank steps with outer merges; default 20 % of all, less `mean_steps`, in whole rounds.
        warmup_every: steps between merges there; default `every`; 0: gradients are averaged at every step.
        warmup_wire: how merges are sent there; default `wire`.
        warmup_delay: steps that a merge is hidden behind there.
        drift_below: end them as soon as spectra drift less than this (see `abtrain.recipes.phase.Until`); 0: never.
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
    # The same without momentum, which would be kept for nothing.
    merge: MergeRule = Mean() if (outer_lr, outer_momentum) == (1, 0) else Outer(outer_lr, outer_momentum)
    rounds = _Rounds(WeightSync(every, merge, wire, delay, fragments), refactor_every, damping, factor_lr, local_lr)
    if warmup_steps is None and are_counts(mean_steps):
        warmup_steps = max(whole_rounds(total_steps, every) - mean_steps, 0)
    prologue = (
        *full_phase("mean", mean_steps, mean_every, warmup_wire or wire, until("agreement", agreement_below)),
        *_warmup(rounds, total_steps, warmup_steps, warmup_every, warmup_wire, warmup_delay, drift_below),
    )
    rebound = _rebound(rounds, rebound_steps, rebound_every)
    settings = Factoring(rank_rule_of(rank_rule, sigma_cutoff, outliers=False), **{**AB_OUTER, **factoring})
    return _recipe("ab_outer", total_steps, prologue, rounds, rebound, settings, lr_rebound_steps)


def ab_local(
    total_steps: int,
    *,
    every: int = 6,
    wire: str = "ternary",
    delay: int = 0,
    fragments: int = 1,
    warmup_steps: int | None = None,
    warmup_every: int | None = None,
    warmup_wire: str | None = None,
    warmup_delay: int = 0,
    drift_below: float = 0.0,
    refactor_every: int = 0,
    rebound_steps: int = 0,
    rebound_every: int | None = None,
    lr_rebound_steps: int | None = None,
    sigma_cutoff: float = 0.22,
    damping: float = 0.1,
    factor_lr: float = 1.0,
    local_lr: float = LOCAL_LR,
    rank_rule: RankRule | str | None = None,
    **factoring: Any,
) -> Recipe:
    """Beyond the paper: `ab_outer` with plain means after short rounds, for transformers from scratch.

    Workers take longer steps between merges, since a small batch alone has more noise to divide by.

    Outer momentum pays after many rounds, and where workers' changes agree; early in the training of a transformer
    they do not. Means of short rounds in 1.8 bits cost as much payload as outer merges of long ones in more bits.

    Takes what `ab_outer` takes, as far as that is not about outer merges. `local_lr` suits four groups, and optimizers
    that divide by the noise of gradients, as Adam does.
    """
    rounds = _Rounds(WeightSync(every, Mean(), wire, delay, fragments), refactor_every, damping, factor_lr, local_lr)
    prologue = _warmup(rounds, total_steps, warmup_steps, warmup_every, warmup_wire, warmup_delay, drift_below)
    rebound = _rebound(rounds, rebound_steps, rebound_every)
    settings = Factoring(rank_rule_of(rank_rule, sigma_cutoff, outliers=False), **{**AB_OUTER, **factoring})
    return _recipe("ab_local", total_steps, prologue, rounds, rebound, settings, lr_rebound_steps)


class _Rounds(NamedTuple):
    """How factors are trained: their rounds, the rounds until they are made anew (0: never), and how they step."""

    sync: WeightSync
    refactor_every: int
    damping: float
    factor_lr: float | None
    local_lr: float


def _warmup(
    rounds: _Rounds,
    total_steps: int,
    steps: int | None,
    every: int | None,
    wire: str | None,
    delay: int,
    drift_below: float,
) -> tuple[Phase, ...]:
    """The full-rank phase before the factors, merged as they are where nothing else is said."""
    sync = rounds.sync
    return full_phase(
        "warmup",
        whole_rounds(total_steps, sync.every) if steps is None else steps,
        sync.every if every is None else every,
        wire or sync.wire,
        until("spectrum_drift", drift_below),
        sync.merge,
        delay,
    )


def _rebound(rounds: _Rounds, steps: int, every: int | None) -> tuple[Phase, ...]:
    """The full-rank phase before factors are made anew."""
    if steps and not rounds.refactor_every:
        raise ConfigurationError(
            f"rebound_steps={steps} come before weights are factored anew, and refactor_every=0 factors them "
            "once: give refactor_every, or leave rebound_steps out"
        )
    sync = rounds.sync
    return full_phase("rebound", steps, sync.every if every is None else every, sync.wire, merge=sync.merge)


def _recipe(
    name: str,
    total_steps: int,
    prologue: tuple[Phase, ...],
    rounds: _Rounds,
    rebound: tuple[Phase, ...],
    factoring: Factoring,
    lr_rebound_steps: int | None,
) -> Recipe:
    """The phases around the factors, which have the steps that are left, or so many rounds."""
    sync, anew, damping, scale, local_lr = rounds
    found = whole_number_problems("refactor_every", anew, least=0)
    if found:
        raise ConfigurationError(found)
    before = [phase.steps for phase in prologue]
    # A phase that ends early leaves more to the factors, which are not to begin a second cycle then.
    steps = total_steps
    if anew and are_counts(sync.every):
        steps = anew * sync.every
    elif are_counts(total_steps, *before) and sum(before) < total_steps and not any(p.until for p in prologue):
        steps = total_steps - sum(before)
    if scale is None:
        scale = FACTOR_LR if damping else 1.0
    factors = Phase("factors", steps, weights="factored", sync=sync, damping=damping, factor_lr=scale)
    cycle = (factors, *rebound)
    climb = sync.every if lr_rebound_steps is None else lr_rebound_steps
    return Recipe(name, total_steps, at_local_lr(prologue, local_lr), at_local_lr(cycle, local_lr), factoring, climb)
