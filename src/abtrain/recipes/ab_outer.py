"""Beyond the paper: all groups train both factors, which last from round to round."""

from __future__ import annotations

from typing import Annotated, Any

from abtrain.errors import ConfigurationError
from abtrain.recipes import shared_options as shared
from abtrain.recipes.building_blocks import are_counts, at_local_lr, full_phase, preset, rank_rule_of, whole_rounds
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.merges import Mean, MergeRule, Outer
from abtrain.recipes.numbers import whole_number_problems
from abtrain.recipes.phase import Phase
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import WeightSync

AB_OUTER = {"keep_dense_if_larger": True, "optimizer_state": "auto"}
"""Settings of `Factoring` in which the recipes here differ from its defaults."""
FACTOR_LR = 2.0
"""The default of `factor_lr` with a preconditioner. Measured: benchmarks/merges.md."""
LOCAL_LR = 2.0
"""The default of `ab_local`: sqrt(4), since a gradient of one of four groups has twice the noise of their mean."""

_PhaseEvery = Annotated[
    int | None, "Steps between merges in that phase; 0: gradients are averaged at every step; by default `every`."
]
_SigmaCutoff = Annotated[
    float,
    "Singular values below this share of the largest are dropped, unless the largest is an outlier "
    "(`SigmaCutoff(outliers=False)`).",
]
_FactorLR = Annotated[
    float | None, "Multiplies preconditioned steps; by default 2, for optimizers that normalize gradients (Adam)."
]


def ab_outer(
    total_steps: int,
    name: str = "ab_outer",
    *,
    every: shared.Every = 20,
    outer_lr: shared.OuterLR = 0.9,
    outer_momentum: shared.OuterMomentum = 0.8,
    wire: shared.Wire = "auto",
    delay: shared.Delay = 0,
    fragments: Annotated[int, "Parts of the model that merge in turns while it is factored."] = 1,
    warmup_steps: Annotated[int | None, "Full-rank steps at the start; by default 20 % of the run."] = None,
    warmup_every: _PhaseEvery = None,
    warmup_wire: Annotated[str | None, "How merges are sent in that phase; by default as `wire`."] = None,
    warmup_delay: Annotated[int, "Training steps that a merge is hidden behind in that phase."] = 0,
    refactor_every: Annotated[int, "Rounds between factorings, in which ranks may fall; 0: factor once."] = 0,
    rebound_steps: Annotated[int, "Full-rank steps before weights are factored again."] = 0,
    rebound_every: _PhaseEvery = None,
    lr_rebound_steps: Annotated[int | None, "Steps of LR rebound after factoring; by default `every`."] = None,
    sigma_cutoff: _SigmaCutoff = 0.22,
    damping: Annotated[float, "Damping of the preconditioner of the factors' steps; 0: no preconditioner."] = 0.1,
    factor_lr: _FactorLR = None,
    local_lr: shared.LocalLR = 1.0,
    rank_rule: shared.Rule = None,
    **factoring: Any,
) -> Recipe:
    """Beyond the paper: full-rank local warm-up, then all groups train both factors, with outer Nesterov merges.

    The inner optimizer's state lasts from round to round, the outer one's from merge to merge. `factoring` takes the
    other fields of `Factoring`. `abtrain recipes ab_outer` lists the options.

    Raises:
        ConfigurationError: values out of range; `rebound_steps` without `refactor_every`.
    """
    # Without momentum the outer optimizer is a mean, and keeps nothing.
    merge: MergeRule = Mean() if (outer_lr, outer_momentum) == (1, 0) else Outer(outer_lr, outer_momentum)
    warmup_steps = whole_rounds(total_steps, every) if warmup_steps is None else warmup_steps
    warmup_every = every if warmup_every is None else warmup_every
    prologue = full_phase("warmup", warmup_steps, warmup_every, warmup_wire or wire, merge, warmup_delay)
    rebound = full_phase("rebound", rebound_steps, every if rebound_every is None else rebound_every, wire, merge)
    settings = Factoring(rank_rule_of(rank_rule, sigma_cutoff, outliers=False), **{**AB_OUTER, **factoring})
    factor_lr = (FACTOR_LR if damping else 1.0) if factor_lr is None else factor_lr
    steps = _factored_steps(total_steps, prologue, every, refactor_every, rebound)
    sync = WeightSync(every, merge, wire, delay, fragments)
    factors = Phase("factors", steps, weights="factored", sync=sync, damping=damping, factor_lr=factor_lr)
    prologue, cycle = at_local_lr(prologue, local_lr), at_local_lr((factors, *rebound), local_lr)
    return Recipe(name, total_steps, prologue, cycle, settings, every if lr_rebound_steps is None else lr_rebound_steps)


ab_local = preset(
    ab_outer,
    "ab_local",
    """Beyond the paper: `ab_outer` with plain means after short rounds, for transformers from scratch.

    Outer momentum pays after many rounds, where workers' changes agree. Early in the training of a transformer they do
    not. Means of short rounds at 1.8 bits a number cost as much payload as outer merges of long rounds at more bits.

    Takes the options of `ab_outer` except those of the outer optimizer. Its `local_lr` suits four groups and optimizers
    that normalize gradients, such as Adam: see `abtrain.recipes.phase.Phase`.
    """,
    fixed={"outer_lr": 1.0, "outer_momentum": 0.0},
    every=6,
    wire="ternary",
    factor_lr=1.0,
    local_lr=LOCAL_LR,
)


def _factored_steps(
    total_steps: int, prologue: tuple[Phase, ...], every: int, refactor_every: int, rebound: tuple[Phase, ...]
) -> int:
    """Length of the factored phase: `refactor_every` rounds, or all steps after the prologue.

    Raises:
        ConfigurationError: `refactor_every` is no number of rounds, or 0 with a rebound before the next factoring.
    """
    found = whole_number_problems("refactor_every", refactor_every, least=0)
    if rebound and not refactor_every:
        found.append(
            f"rebound_steps={rebound[0].steps} come before weights are factored again, but refactor_every=0 factors "
            "them once: give refactor_every, or leave rebound_steps out"
        )
    if found:
        raise ConfigurationError(found)
    if refactor_every and are_counts(every):
        return refactor_every * every
    before = [phase.steps for phase in prologue]
    if are_counts(total_steps, *before) and sum(before) < total_steps:
        return total_steps - sum(before)
    return total_steps
