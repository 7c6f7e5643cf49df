"""Defines recipes without factors: common methods, which are baselines for the other recipes."""

from __future__ import annotations

from typing import Annotated, Literal

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes import shared
from abtrain.recipes.merges import Outer
from abtrain.recipes.options import only_declared
from abtrain.recipes.phase import Phase
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.shared import full_phase, merge_rule
from abtrain.recipes.sync import GradientSync, WeightSync


@only_declared
def ddp(
    total_steps: int, *, wire: Annotated[Literal["fp32", "bf16"], "Format in which gradients are sent."] = "fp32"
) -> Recipe:
    """Plain data parallel training: gradients are averaged over all workers at every step."""
    if wire not in ("fp32", "bf16"):
        raise ConfigurationError(f"unknown wire format {wire!r} for gradients: {nearest(str(wire), ('fp32', 'bf16'))}")
    return Recipe("ddp", total_steps, cycle=(Phase("full", total_steps, sync=GradientSync(wire)),))


@only_declared
def powersgd(total_steps: int, *, rank: Annotated[int, "Rank of the factors sent for each gradient."] = 4) -> Recipe:
    """Data parallel training that sends gradients as low-rank factors, with error feedback (arXiv 1905.13727)."""
    return Recipe("powersgd", total_steps, cycle=(Phase("full", total_steps, sync=GradientSync("powersgd", rank)),))


@only_declared
def solo(total_steps: int) -> Recipe:
    """No communication: each worker trains its own model. This bounds speed from above and accuracy from below."""
    return Recipe("solo", total_steps, cycle=(Phase("solo", total_steps, sync=None),))


@only_declared
def local_sgd(
    total_steps: int,
    *,
    every: shared.Every = 20,
    merge: shared.Merge = "mean",
    temperature: shared.Temperature = 0.1,
    wire: shared.Wire = "fp32",
    delay: shared.Delay = 0,
    fragments: shared.Fragments = 1,
    warmup_steps: Annotated[int, "Steps of the warm-up phase at the start."] = 0,
    warmup_every: shared.PhaseEvery = 0,
    rebound_steps: Annotated[int, "Steps of the rebound phase after every merge."] = 0,
    rebound_every: shared.PhaseEvery = 0,
    outer_device: shared.OuterDevice = None,
) -> Recipe:
    """Full-rank local training: groups train separately for `every` steps, then their weights are averaged.

    With warm-up and rebound, this is `ab` with full-rank weights. A comparison of both shows the effect of low rank.
    `abtrain recipes local_sgd` lists the options.
    """
    sync = WeightSync(every, merge_rule(merge, temperature), wire, delay, fragments)
    local = Phase("local", every if rebound_steps else total_steps, sync=sync)
    rebound = full_phase("rebound", rebound_steps, rebound_every, wire)
    prologue = full_phase("warmup", warmup_steps, warmup_every, wire)
    return Recipe("local_sgd", total_steps, prologue, (local, *rebound), outer_device=outer_device)


@only_declared
def diloco(
    total_steps: int,
    *,
    every: shared.Every = 20,
    outer_lr: shared.OuterLR = 0.7,
    outer_momentum: shared.OuterMomentum = 0.9,
    wire: shared.Wire = "fp32",
    delay: shared.Delay = 0,
    fragments: shared.Fragments = 1,
    outer_device: shared.OuterDevice = None,
) -> Recipe:
    """Full-rank local training whose merges use an outer Nesterov optimizer (DiLoCo, arXiv 2311.08105).

    `abtrain recipes diloco` lists the options.
    """
    sync = WeightSync(every, Outer(outer_lr, outer_momentum), wire, delay, fragments)
    cycle = (Phase("local", total_steps, sync=sync),)
    return Recipe("diloco", total_steps, cycle=cycle, outer_device=outer_device)
