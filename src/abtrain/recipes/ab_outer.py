"""Defines recipes that are not in the paper: all groups train both factors, and merges keep the factorization."""

from __future__ import annotations

from typing import Annotated, Any

from abtrain.errors import ConfigurationError
from abtrain.recipes import shared
from abtrain.recipes.factoring import Factoring
from abtrain.recipes.merges import Mean, MergeRule, Outer
from abtrain.recipes.numbers import whole_number_problems
from abtrain.recipes.options import only_declared
from abtrain.recipes.phase import Phase
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.shared import are_counts, full_phase, given_or, preset, rank_rule_of, whole_rounds
from abtrain.recipes.sync import WeightSync

_PhaseEvery = Annotated[
    int | None, "Steps between merges in this phase; 0: gradients are averaged at every step; by default `every`."
]
_SigmaCutoff = Annotated[
    float,
    "Singular values below this share of the largest one are dropped, unless the largest is an outlier "
    "(`SigmaCutoff(outliers=False)`).",
]
_FactorLR = Annotated[
    float | None, "Multiplies preconditioned updates; default of `ab_outer`: 2, which suits Adam, or 1 if damping is 0."
]


@only_declared
def ab_outer(
    total_steps: int,
    name: str = "ab_outer",
    *,
    every: shared.Every = 20,
    outer_lr: shared.OuterLR = 0.9,
    outer_momentum: shared.OuterMomentum = 0.8,
    wire: shared.Wire = "auto",
    delay: shared.Delay = 0,
    fragments: Annotated[int, "Number of parts of the factored model that are merged in turn."] = 1,
    warmup_steps: Annotated[int | None, "Full-rank steps at the start; by default 20 % of the run."] = None,
    warmup_every: _PhaseEvery = None,
    warmup_wire: Annotated[str | None, "Format in which the warm-up's merges are sent; by default `wire`."] = None,
    warmup_delay: Annotated[int, "Training steps during which a merge in the warm-up is sent."] = 0,
    refactor_every: Annotated[int, "Rounds (see `every`) until weights are factored again; 0: never again."] = 0,
    rebound_steps: Annotated[int, "Full-rank steps before weights are factored again."] = 0,
    rebound_every: _PhaseEvery = None,
    lr_rebound_steps: Annotated[int | None, "Learning-rate warm-up steps after factoring; by default `every`."] = None,
    sigma_cutoff: _SigmaCutoff = 0.22,
    damping: Annotated[
        float, "Damping in the factors' preconditioner, which leaves Muon's steps as they are; 0: no preconditioning."
    ] = 0.1,
    factor_lr: _FactorLR = None,
    outer_device: shared.OuterDevice = None,
    rank_rule: shared.Rule = None,
    **factoring: Any,
) -> Recipe:
    """Not in the paper: full-rank local warm-up, then all groups train both factors, with outer Nesterov merges.

    Merges reset no optimizer state. Other keyword arguments are fields of `Factoring`, such as `exclude`.

    Raises:
        ConfigurationError: settings are invalid or `rebound_steps` has no effect; one message for each problem.
    """
    # With these settings, the outer optimizer computes a mean, which needs no state.
    merge: MergeRule = Mean() if (outer_lr, outer_momentum) == (1, 0) else Outer(outer_lr, outer_momentum)
    warmup_steps = given_or(warmup_steps, whole_rounds(total_steps, every))
    warmup_every, rebound_every = given_or(warmup_every, every), given_or(rebound_every, every)
    prologue = full_phase("warmup", warmup_steps, warmup_every, warmup_wire or wire, merge, warmup_delay)
    rebound = full_phase("rebound", rebound_steps, rebound_every, wire, merge)
    factoring = {"keep_dense_if_larger": True, "optimizer_state": "auto", **factoring}
    settings = Factoring(rank_rule_of(rank_rule, sigma_cutoff, outliers=False), **factoring)
    factor_lr = given_or(factor_lr, 2.0 if damping else 1.0)  # measured: benchmarks/merges.md
    steps = _factored_steps(total_steps, warmup_steps, every, refactor_every, rebound_steps)
    sync = WeightSync(every, merge, wire, delay, fragments)
    factors = Phase("factors", steps, "factored", sync=sync, damping=damping, factor_lr=factor_lr)
    lr_rebound_steps = given_or(lr_rebound_steps, every)
    return Recipe(name, total_steps, prologue, (factors, *rebound), settings, lr_rebound_steps, outer_device)


ab_local = preset(
    ab_outer,
    "ab_local",
    """Not in the paper: `ab_outer` with plain averages after short rounds, to train transformers from scratch.

    Outer momentum helps if workers' changes agree, but early in a transformer's training they do not. Averages after
    short rounds at 1.8 bits per number send about the same bytes as outer merges after long rounds at more bits.

    Takes the options of `ab_outer` except those of the outer optimizer. Its learning rate is about that of data
    parallel training, and not half of it as for `ab_outer`: means do not lengthen steps as outer momentum does.
    """,
    fixed={"outer_lr": 1.0, "outer_momentum": 0.0},
    every=6,
    wire="ternary",
    factor_lr=1.0,
)


def _factored_steps(total_steps: int, warmup_steps: int, every: int, refactor_every: int, rebound_steps: int) -> int:
    """Returns the length of the factored phase in steps: `refactor_every` rounds, or all steps after the warm-up.

    Raises:
        ConfigurationError: `refactor_every` is not a whole number, or it is 0 although `rebound_steps` is not 0.
    """
    found = whole_number_problems("refactor_every", refactor_every, least=0)
    if rebound_steps != 0 and not refactor_every:
        found.append(
            f"rebound_steps={rebound_steps} has no effect, since refactor_every=0 factors weights only once: "
            "set refactor_every to at least 1, or leave rebound_steps out"
        )
    if found:
        raise ConfigurationError(found)
    if refactor_every and are_counts(every):
        return refactor_every * every
    if are_counts(total_steps, warmup_steps) and warmup_steps < total_steps:
        return total_steps - warmup_steps
    return total_steps
