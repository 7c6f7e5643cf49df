"""The named recipes: data only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Literal

from abtrain.errors import ConfigurationError, nearest
from abtrain.lowrank.rank import SigmaCutoff
from abtrain.recipe import Factoring, Phase, RankRule, Recipe
from abtrain.sync import GradientSync, Outer, WeightSync, Wire

WARMUP_SHARE = 0.2
"""Warm-up over all steps: the paper's guideline (Section IV.C), which all its runs follow."""
AB_SHARE = 1 / 30
"""Steps of one group phase over all steps: 3.33 % in the guideline."""
REBOUND_SHARE = 0.25
"""Full-rank rebound over the group phase."""
LR_REBOUND_SHARE = 0.5
"""LR rebound over the group phase."""


def ddp(total_steps: int, *, wire: Literal["fp32", "bf16"] = "fp32") -> Recipe:
    """Plain data parallel training: gradients averaged over all workers at every step.

    Args:
        total_steps: of the run.
        wire: gradients as they are, or rounded to bfloat16.
    """
    return Recipe("ddp", total_steps, cycle=(Phase("full", total_steps, sync=GradientSync(wire)),))


def powersgd(total_steps: int, *, rank: int = 4) -> Recipe:
    """Data parallel training with gradients sent as low-rank factors with error feedback (arXiv 1905.13727).

    Args:
        total_steps: of the run.
        rank: of the factors.
    """
    return Recipe("powersgd", total_steps, cycle=(Phase("full", total_steps, sync=GradientSync("powersgd", rank)),))


def solo(total_steps: int) -> Recipe:
    """No communication at all: each worker trains a model of its own. The limit in speed, and the floor in accuracy."""
    return Recipe("solo", total_steps, cycle=(Phase("solo", total_steps, sync=None),))


def local_sgd(total_steps: int, *, every: int = 20, warmup_steps: int = 0, rebound_steps: int = 0) -> Recipe:
    """Full-rank local training: groups run alone for `every` steps, then their weights are averaged.

    With `warmup_steps` and `rebound_steps` of data parallel training around it, this is the schedule of `ab` without
    its factors: what low rank itself gains and costs.

    Args:
        total_steps: of the run.
        every: steps between merges.
        warmup_steps: data parallel steps at the start.
        rebound_steps: data parallel steps after every merge.
    """
    local = Phase("local", every if rebound_steps else total_steps, sync=WeightSync(every))
    cycle = (local, Phase("rebound", rebound_steps)) if rebound_steps else (local,)
    return Recipe("local_sgd", total_steps, prologue=_warmup(warmup_steps), cycle=cycle)


def ab(
    total_steps: int,
    *,
    sigma_cutoff: float = 0.15,
    warmup_steps: int | None = None,
    ab_steps: int | None = None,
    rebound_steps: int | None = None,
    lr_rebound_steps: int | None = None,
    rank_rule: RankRule | None = None,
    **factoring: Any,
) -> Recipe:
    """AB-training, Algorithm 1 of the paper: half of the groups train A, the others B, then all average and recover.

    Args:
        total_steps: of the run.
        sigma_cutoff: singular values below this share of the largest are dropped.
        warmup_steps: full-rank data parallel steps at the start; default 20 % of all.
        ab_steps: steps of a group phase; default 3.33 % of all.
        rebound_steps: full-rank data parallel steps after each; default a quarter of `ab_steps`.
        lr_rebound_steps: steps over which the learning rate climbs back; default half of `ab_steps`.
        rank_rule: in place of `SigmaCutoff(sigma_cutoff)`.
        factoring: the other settings of `abtrain.recipe.Factoring`.
    """
    ab_steps = _share(total_steps, AB_SHARE) if ab_steps is None else ab_steps
    group = Phase("group", ab_steps, weights="factored", trains="a_or_b", sync=WeightSync(ab_steps))
    return _ab_recipe(
        "ab",
        total_steps,
        group,
        warmup_steps,
        rebound_steps,
        lr_rebound_steps,
        Factoring(rank_rule or SigmaCutoff(sigma_cutoff), **factoring),
    )


def ab_no_groups(
    total_steps: int,
    *,
    sigma_cutoff: float = 0.15,
    warmup_steps: int | None = None,
    ab_steps: int | None = None,
    rebound_steps: int | None = None,
    lr_rebound_steps: int | None = None,
    rank_rule: RankRule | None = None,
    **factoring: Any,
) -> Recipe:
    """The paper's "AB - No Groups": the schedule of `ab`, but all workers train B together, in data parallel.

    Takes what `ab` takes.
    """
    ab_steps = _share(total_steps, AB_SHARE) if ab_steps is None else ab_steps
    together = Phase("low_rank", ab_steps, weights="factored", trains="b", sync=GradientSync())
    return _ab_recipe(
        "ab_no_groups",
        total_steps,
        together,
        warmup_steps,
        rebound_steps,
        lr_rebound_steps,
        Factoring(rank_rule or SigmaCutoff(sigma_cutoff), **factoring),
    )


def diloco(
    total_steps: int, *, every: int = 20, outer_lr: float = 0.7, outer_momentum: float = 0.9, wire: Wire = "fp32"
) -> Recipe:
    """Full-rank local training with outer Nesterov merges (DiLoCo, arXiv 2311.08105).

    Args:
        total_steps: of the run.
        every: steps between merges.
        outer_lr: learning rate of the outer optimizer.
        outer_momentum: its momentum.
        wire: in which code merges are sent.
    """
    sync = WeightSync(every, Outer(outer_lr, outer_momentum), wire)
    return Recipe("diloco", total_steps, cycle=(Phase("local", total_steps, sync=sync),))


def ab_outer(
    total_steps: int,
    *,
    every: int = 20,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    wire: Wire = "int4",
    warmup_steps: int | None = None,
    lr_rebound_steps: int | None = None,
    sigma_cutoff: float = 0.2,
    damping: float = 0.1,
    rank_rule: RankRule | None = None,
    **factoring: Any,
) -> Recipe:
    """Beyond the paper: full-rank local warm-up, then all groups train both factors, with outer Nesterov merges.

    The weights are factored once. Rounds keep the inner optimizer's state, and merges keep the outer one's.

    Args:
        total_steps: of the run.
        every: steps between merges.
        outer_lr: learning rate of the outer optimizer.
        outer_momentum: its momentum.
        wire: in which code merges are sent.
        warmup_steps: full-rank local steps at the start; default 20 % of all, in whole rounds.
        lr_rebound_steps: steps over which the learning rate climbs back after factoring; default `every`.
        sigma_cutoff: singular values below this share of the largest are dropped.
        damping: of the preconditioner of the factors' gradients; 0: no preconditioner.
        rank_rule: in place of `SigmaCutoff(sigma_cutoff)`.
        factoring: the other settings of `abtrain.recipe.Factoring`.
    """
    if warmup_steps is None:
        warmup_steps = _whole_rounds(total_steps, every)
    sync = WeightSync(every, Outer(outer_lr, outer_momentum), wire)
    prologue = (Phase("warmup", warmup_steps, sync=sync),) if warmup_steps != 0 else ()
    # What is no number is reported with the rest.
    numbers = isinstance(total_steps, int) and isinstance(warmup_steps, int)
    rest = max(total_steps - warmup_steps, 1) if numbers else total_steps
    factors = Phase("factors", rest, weights="factored", sync=sync, damping=damping)
    settings = Factoring(rank_rule or SigmaCutoff(sigma_cutoff), **{"keep_dense_if_larger": True, **factoring})
    return Recipe(
        "ab_outer", total_steps, prologue, (factors,), settings, every if lr_rebound_steps is None else lr_rebound_steps
    )


RECIPES: dict[str, Callable[..., Recipe]] = {
    "ab": ab,
    "ab_no_groups": ab_no_groups,
    "ab_outer": ab_outer,
    "ddp": ddp,
    "diloco": diloco,
    "local_sgd": local_sgd,
    "powersgd": powersgd,
    "solo": solo,
}
DEFAULT = "ab"


def options_of(name: str) -> frozenset[str]:
    """Names of the options that a recipe takes.

    Raises:
        ConfigurationError: no recipe is called so.
    """
    if name not in RECIPES:
        raise ConfigurationError(f"unknown recipe {name!r}: {nearest(name, RECIPES)}")
    options: set[str] = set()
    for parameter in inspect.signature(RECIPES[name]).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY:
            options.add(parameter.name)
        elif parameter.kind is parameter.VAR_KEYWORD:
            options.update(set(Factoring.__dataclass_fields__) - {"rank_rule"})
    return frozenset(options)


def build(name: str, total_steps: int, **options: Any) -> Recipe:
    """The recipe called `name`.

    Raises:
        ConfigurationError: an unknown name or option, or values that cannot be; all of them at once.
    """
    known = options_of(name)
    unknown = [f"recipe {name!r} has no option {o!r}: {nearest(o, known)}" for o in options if o not in known]
    if unknown:
        raise ConfigurationError(unknown)
    return RECIPES[name](total_steps, **options)


def _ab_recipe(
    name: str,
    total_steps: int,
    factored: Phase,
    warmup_steps: int | None,
    rebound_steps: int | None,
    lr_rebound_steps: int | None,
    factoring: Factoring,
) -> Recipe:
    """Prologue and cycle of Algorithm 1 around a factored phase, lengths by the guideline where they are not given."""
    if warmup_steps is None:
        warmup_steps = _share(total_steps, WARMUP_SHARE, least=0)
    if rebound_steps is None:
        rebound_steps = _share(factored.steps, REBOUND_SHARE)
    if lr_rebound_steps is None:
        lr_rebound_steps = _share(factored.steps, LR_REBOUND_SHARE, least=0)
    cycle = (factored, Phase("rebound", rebound_steps)) if rebound_steps != 0 else (factored,)
    return Recipe(name, total_steps, _warmup(warmup_steps), cycle, factoring, lr_rebound_steps)


def _warmup(steps: int) -> tuple[Phase, ...]:
    return (Phase("warmup", steps),) if steps != 0 else ()


def _whole_rounds(total_steps: int, every: int) -> int:
    """The guideline's warm-up in whole rounds, at least one where another one fits behind it."""
    if not (isinstance(total_steps, int) and isinstance(every, int) and 0 < every <= total_steps // 2):
        return 0
    return max(1, round(WARMUP_SHARE * total_steps / every)) * every


def _share(steps: int, share: float, least: int = 1) -> int:
    # What is no number of steps is reported with the phase that has it, together with everything else.
    return max(least, round(share * steps)) if isinstance(steps, int) else least
