"""The named recipes: data only."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from abtrain.errors import ConfigurationError, nearest
from abtrain.lowrank.rank import SigmaCutoff, parse_rule
from abtrain.recipe import Factoring, Measure, Phase, RankRule, Recipe, Until
from abtrain.sync import GradientSync, Mean, Merge, Outer, Sync, TrainedOnly, Trains, Weighted, WeightSync

MergeName = Literal["mean", "trained_only", "weighted"]

WARMUP_SHARE = 0.2
"""Warm-up over all steps: the paper's guideline (Section IV.C), which all its runs follow."""
AB_SHARE = 1 / 30
"""Steps of one group phase over all steps: 3.33 % in the guideline."""
REBOUND_SHARE = 0.25
"""Full-rank rebound over the group phase."""
LR_REBOUND_SHARE = 0.5
"""LR rebound over the group phase."""
AB_OUTER = {"keep_dense_if_larger": True, "optimizer_state": "project"}
"""What `ab_outer` changes of `Factoring`'s defaults."""
FACTOR_LR = 2.0
"""Of `ab_outer`, with a preconditioner. Measured: benchmarks/merges.md."""


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


def local_sgd(
    total_steps: int,
    *,
    every: int = 20,
    merge: MergeName = "mean",
    temperature: float = 0.1,
    wire: str = "fp32",
    delay: int = 0,
    fragments: int = 1,
    warmup_steps: int = 0,
    warmup_every: int = 0,
    rebound_steps: int = 0,
    rebound_every: int = 0,
    local_lr: float = 1.0,
) -> Recipe:
    """Full-rank local training: groups run alone for `every` steps, then their weights are averaged.

    With `warmup_steps` and `rebound_steps` of data parallel training around it, this is the schedule of `ab` without
    its factors: what low rank itself gains and costs.

    Args:
        total_steps: of the run.
        every: steps between merges.
        merge: the mean over all, over those who trained, or weighted by training loss.
        temperature: of `weighted`, in the units of the loss.
        wire: how merges are sent (see `abtrain.sync.WeightSync`).
        delay: steps that a merge is hidden behind.
        fragments: parts of the model that merge in turns.
        warmup_steps: steps at the start with a sync of their own.
        warmup_every: steps between merges there; 0: gradients are averaged at every step.
        rebound_steps: steps after every merge with a sync of their own.
        rebound_every: steps between merges there; 0: gradients are averaged at every step.
        local_lr: multiplies the learning rate between merges (see `abtrain.recipe.Phase`).
    """
    sync = WeightSync(every, _merge(merge, temperature), wire, delay, fragments)
    local = Phase("local", every if rebound_steps else total_steps, sync=sync)
    cycle = (local, *_full("rebound", rebound_steps, rebound_every, wire))
    prologue = _full("warmup", warmup_steps, warmup_every, wire)
    return Recipe("local_sgd", total_steps, _alone(prologue, local_lr), _alone(cycle, local_lr))


def ab(
    total_steps: int,
    *,
    sigma_cutoff: float = 0.15,
    warmup_steps: int | None = None,
    warmup_every: int = 0,
    ab_steps: int | None = None,
    every: int | None = None,
    trains: Trains = "a_or_b",
    merge: MergeName = "mean",
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
        sigma_cutoff: singular values below this share of the largest are dropped.
        warmup_steps: full-rank steps at the start; default 20 % of all.
        warmup_every: steps between merges there; 0, as in the paper: gradients are averaged at every step.
        ab_steps: steps of a group phase; default 3.33 % of all.
        every: steps between merges in a group phase; default one merge, at its end.
        trains: one factor by the group's role (the paper), or the same factor in all groups, another in each round
            (`a_then_b`): then the average of the products is the product of the averages.
        merge: the mean over all (the paper), over those who trained, or weighted by training loss.
        temperature: of `weighted`, in the units of the loss.
        wire: how merges are sent (see `abtrain.sync.WeightSync`).
        rebound_steps: full-rank steps after each group phase; default a quarter of `ab_steps`.
        rebound_every: steps between merges there; 0, as in the paper: gradients are averaged at every step.
        lr_rebound_steps: steps over which the learning rate climbs back; default half of `ab_steps`.
        rank_rule: in place of `SigmaCutoff(sigma_cutoff)`: a rule, or its name such as `energy:0.95`.
        factoring: the other settings of `abtrain.recipe.Factoring`.
    """
    ab_steps = _share(total_steps, AB_SHARE) if ab_steps is None else ab_steps
    sync = WeightSync(ab_steps if every is None else every, _merge(merge, temperature), wire)
    group = Phase("group", ab_steps, weights="factored", trains=trains, sync=sync)
    full = _Full(warmup_steps, warmup_every, rebound_steps, rebound_every, wire)
    settings = Factoring(_rule(rank_rule, sigma_cutoff), **factoring)
    return _ab_recipe("ab", total_steps, group, full, lr_rebound_steps, settings)


def ab_no_groups(
    total_steps: int,
    *,
    sigma_cutoff: float = 0.15,
    warmup_steps: int | None = None,
    warmup_every: int = 0,
    ab_steps: int | None = None,
    rebound_steps: int | None = None,
    rebound_every: int = 0,
    lr_rebound_steps: int | None = None,
    wire: str = "fp32",
    rank_rule: RankRule | str | None = None,
    **factoring: Any,
) -> Recipe:
    """The paper's "AB - No Groups": the schedule of `ab`, but all workers train B together, in data parallel.

    Takes what `ab` takes, as far as that is not about groups; `wire` is that of merges in warm-up and rebound.
    """
    ab_steps = _share(total_steps, AB_SHARE) if ab_steps is None else ab_steps
    together = Phase("low_rank", ab_steps, weights="factored", trains="b", sync=GradientSync())
    full = _Full(warmup_steps, warmup_every, rebound_steps, rebound_every, wire)
    settings = Factoring(_rule(rank_rule, sigma_cutoff), **factoring)
    return _ab_recipe("ab_no_groups", total_steps, together, full, lr_rebound_steps, settings)


def diloco(
    total_steps: int,
    *,
    every: int = 20,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    wire: str = "fp32",
    delay: int = 0,
    fragments: int = 1,
    mean_steps: int = 0,
    mean_every: int = 0,
    agreement_below: float = 0.0,
    local_lr: float = 1.0,
) -> Recipe:
    """Full-rank local training with outer Nesterov merges (DiLoCo, arXiv 2311.08105).

    Args:
        total_steps: of the run.
        every: steps between merges.
        outer_lr: learning rate of the outer optimizer.
        outer_momentum: its momentum.
        wire: how merges are sent (see `abtrain.sync.WeightSync`).
        delay: steps that a merge is hidden behind.
        fragments: parts of the model that merge in turns.
        mean_steps: steps at the start in which merges are plain means.
        mean_every: steps between merges there; 0: gradients are averaged at every step.
        agreement_below: end them as soon as workers agree less than this (see `abtrain.recipe.Until`); 0: never.
        local_lr: multiplies the learning rate between merges (see `abtrain.recipe.Phase`).
    """
    sync = WeightSync(every, Outer(outer_lr, outer_momentum), wire, delay, fragments)
    prologue = _full("mean", mean_steps, mean_every, wire, _until("agreement", agreement_below))
    cycle = (Phase("local", total_steps, sync=sync),)
    return Recipe("diloco", total_steps, _alone(prologue, local_lr), _alone(cycle, local_lr))


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
        wire: how merges are sent (see `abtrain.sync.WeightSync`).
        delay: steps that a merge is hidden behind.
        fragments: parts of the model that merge in turns.
        mean_steps: steps at the start in which merges are plain means, before the warm-up.
        mean_every: steps between merges there; 0: gradients are averaged at every step.
        agreement_below: end them as soon as workers agree less than this (see `abtrain.recipe.Until`); 0: never.
        warmup_steps: full-rank steps with outer merges; default 20 % of all, less `mean_steps`, in whole rounds.
        warmup_every: steps between merges there; default `every`; 0: gradients are averaged at every step.
        warmup_wire: how merges are sent there; default `wire`.
        drift_below: end them as soon as spectra drift less than this (see `abtrain.recipe.Until`); 0: never.
        refactor_every: rounds after which weights are factored anew, so that ranks can fall; 0: factor once.
        rebound_steps: full-rank steps before weights are factored anew.
        rebound_every: steps between merges there; default `every`; 0: gradients are averaged at every step.
        lr_rebound_steps: steps over which the learning rate climbs back after factoring; default `every`.
        sigma_cutoff: singular values below this share of the largest are dropped, unless that is an outlier
            (`SigmaCutoff(outliers=False)`).
        damping: of the preconditioner of the factors' steps; 0: no preconditioner.
        factor_lr: multiplies preconditioned steps; default 2, which suits optimizers that normalize gradients (Adam).
        local_lr: multiplies the learning rate between merges (see `abtrain.recipe.Phase`).
        rank_rule: in place of `SigmaCutoff(sigma_cutoff)`: a rule, or its name such as `energy:0.95`.
        factoring: the other settings of `abtrain.recipe.Factoring`.

    Raises:
        ConfigurationError: values that cannot be; `rebound_steps` without `refactor_every`.
    """
    if rebound_steps and not refactor_every:
        raise ConfigurationError(
            f"rebound_steps={rebound_steps} come before weights are factored anew, and refactor_every=0 factors them "
            "once: give refactor_every, or leave rebound_steps out"
        )
    if warmup_steps is None:
        warmup_steps = max(_whole_rounds(total_steps, every) - mean_steps, 0)
    merge = Outer(outer_lr, outer_momentum)
    warmup: Sync = GradientSync()
    if warmup_every != 0:
        warmup = WeightSync(every if warmup_every is None else warmup_every, merge, warmup_wire or wire)
    prologue = _full("mean", mean_steps, mean_every, warmup_wire or wire, _until("agreement", agreement_below))
    if warmup_steps != 0:
        prologue += (Phase("warmup", warmup_steps, sync=warmup, until=_until("spectrum_drift", drift_below)),)
    # A phase that ends early leaves more to the factors, which are not to begin a second cycle then.
    numbers = all(isinstance(steps, int) for steps in (total_steps, mean_steps, warmup_steps))
    rest = max(total_steps - mean_steps - warmup_steps, 1) if numbers else total_steps
    steps = refactor_every * every if refactor_every else total_steps if agreement_below or drift_below else rest
    factors = WeightSync(every, merge, wire, delay, fragments)
    scale = factor_lr if factor_lr is not None else FACTOR_LR if damping else 1.0
    cycle: tuple[Phase, ...] = (
        Phase("factors", steps, weights="factored", sync=factors, damping=damping, factor_lr=scale),
    )
    if rebound_steps:
        cycle += _full("rebound", rebound_steps, every if rebound_every is None else rebound_every, wire, merge=merge)
    settings = Factoring(_rule(rank_rule, sigma_cutoff, outliers=False), **{**AB_OUTER, **factoring})
    climb = every if lr_rebound_steps is None else lr_rebound_steps
    return Recipe("ab_outer", total_steps, _alone(prologue, local_lr), _alone(cycle, local_lr), settings, climb)


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
DEFAULT = "ab_outer"


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


class _Full(NamedTuple):
    """The full-rank phases of Algorithm 1: their lengths (None: by the guideline), and how workers agree in them."""

    warmup_steps: int | None
    warmup_every: int
    rebound_steps: int | None
    rebound_every: int
    wire: str


def _ab_recipe(
    name: str, total_steps: int, factored: Phase, full: _Full, lr_rebound_steps: int | None, factoring: Factoring
) -> Recipe:
    """Prologue and cycle of Algorithm 1 around a factored phase, lengths by the guideline where they are not given."""
    warmup_steps, rebound_steps = full.warmup_steps, full.rebound_steps
    if warmup_steps is None:
        warmup_steps = _share(total_steps, WARMUP_SHARE, least=0)
    if rebound_steps is None:
        rebound_steps = _share(factored.steps, REBOUND_SHARE)
    if lr_rebound_steps is None:
        lr_rebound_steps = _share(factored.steps, LR_REBOUND_SHARE, least=0)
    prologue = _full("warmup", warmup_steps, full.warmup_every, full.wire)
    cycle = (factored, *_full("rebound", rebound_steps, full.rebound_every, full.wire))
    return Recipe(name, total_steps, prologue, cycle, factoring, lr_rebound_steps)


def _full(
    name: str, steps: int, every: int, wire: str, until: Until | None = None, merge: Merge = Mean()
) -> tuple[Phase, ...]:
    """A full-rank phase, or none if it has no steps: with merges every so many steps, or with shared gradients (0)."""
    if steps == 0:
        return ()
    sync: Sync = GradientSync() if every == 0 else WeightSync(every, merge, wire)
    return (Phase(name, steps, sync=sync, until=until),)


def _alone(phases: tuple[Phase, ...], local_lr: float) -> tuple[Phase, ...]:
    """The phases with this `Phase.local_lr` where workers train alone between merges."""
    return tuple(replace(p, local_lr=local_lr) if isinstance(p.sync, WeightSync) else p for p in phases)


def _merge(name: MergeName, temperature: float) -> Merge:
    merges: dict[str, Merge] = {"mean": Mean(), "trained_only": TrainedOnly(), "weighted": Weighted(temperature)}
    if name not in merges:
        raise ConfigurationError(f"unknown merge {name!r}: {nearest(str(name), merges)}")
    return merges[name]


def _rule(rule: RankRule | str | None, sigma_cutoff: float, outliers: bool = True) -> RankRule:
    if isinstance(rule, str):
        return parse_rule(rule)
    return SigmaCutoff(sigma_cutoff, outliers=outliers) if rule is None else rule


def _until(measure: Measure, below: float) -> Until | None:
    return Until(measure, below) if below != 0 else None


def _whole_rounds(total_steps: int, every: int) -> int:
    """The guideline's warm-up in whole rounds, at least one where another one fits behind it."""
    if not (isinstance(total_steps, int) and isinstance(every, int) and 0 < every <= total_steps // 2):
        return 0
    return max(1, round(WARMUP_SHARE * total_steps / every)) * every


def _share(steps: int, share: float, least: int = 1) -> int:
    # What is no number of steps is reported with the phase that has it, together with everything else.
    return max(least, round(share * steps)) if isinstance(steps, int) else least
