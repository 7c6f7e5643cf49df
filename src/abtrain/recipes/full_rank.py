"""Recipes without factors: what users have today, and what ours are measured against."""

from __future__ import annotations

from typing import Literal

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.building_blocks import at_local_lr, full_phase, merge_rule
from abtrain.recipes.merges import MergeRule, Outer
from abtrain.recipes.phase import Phase
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import GradientSync, WeightSync


def ddp(total_steps: int, *, wire: Literal["fp32", "bf16"] = "fp32") -> Recipe:
    """Plain data parallel training: gradients averaged over all workers at every step.

    Args:
        total_steps: of the run.
        wire: gradients as they are, or rounded to bfloat16.
    """
    if wire not in ("fp32", "bf16"):
        raise ConfigurationError(f"unknown wire {wire!r} of gradients: {nearest(str(wire), ('fp32', 'bf16'))}")
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
    merge: MergeRule | str = "mean",
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
        merge: a rule of `abtrain.recipes.merges`, or its name: mean, trained_only or weighted.
        temperature: of `weighted`, in the units of the loss.
        wire: how merges are sent (see `abtrain.recipes.sync.WeightSync`).
        delay: steps that a merge is hidden behind; the last one of a phase, so each before a rebound, is waited for.
        fragments: parts of the model that merge in turns; all at once where the phase ends.
        warmup_steps: steps at the start with a sync of their own.
        warmup_every: steps between merges there; 0: gradients are averaged at every step.
        rebound_steps: steps after every merge with a sync of their own.
        rebound_every: steps between merges there; 0: gradients are averaged at every step.
        local_lr: multiplies the learning rate between merges (see `abtrain.recipes.phase.Phase`).
    """
    sync = WeightSync(every, merge_rule(merge, temperature), wire, delay, fragments)
    local = Phase("local", every if rebound_steps else total_steps, sync=sync)
    cycle = (local, *full_phase("rebound", rebound_steps, rebound_every, wire))
    prologue = full_phase("warmup", warmup_steps, warmup_every, wire)
    return Recipe("local_sgd", total_steps, at_local_lr(prologue, local_lr), at_local_lr(cycle, local_lr))


def diloco(
    total_steps: int,
    *,
    every: int = 20,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    wire: str = "fp32",
    delay: int = 0,
    fragments: int = 1,
    local_lr: float = 1.0,
) -> Recipe:
    """Full-rank local training with outer Nesterov merges (DiLoCo, arXiv 2311.08105).

    Args:
        total_steps: of the run.
        every: steps between merges.
        outer_lr: learning rate of the outer optimizer.
        outer_momentum: its momentum.
        wire: how merges are sent (see `abtrain.recipes.sync.WeightSync`).
        delay: steps that a merge is hidden behind.
        fragments: parts of the model that merge in turns.
        local_lr: multiplies the learning rate between merges (see `abtrain.recipes.phase.Phase`).
    """
    sync = WeightSync(every, Outer(outer_lr, outer_momentum), wire, delay, fragments)
    cycle = (Phase("local", total_steps, sync=sync),)
    return Recipe("diloco", total_steps, cycle=at_local_lr(cycle, local_lr))
