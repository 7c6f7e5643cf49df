"""What recipes are put together from."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from abtrain.errors import ConfigurationError, nearest
from abtrain.lowrank.rank import SigmaCutoff, parse_rule
from abtrain.recipe import Measure, Phase, RankRule, Until
from abtrain.sync import GradientSync, Mean, Merge, Sync, TrainedOnly, Weighted, WeightSync

MergeName = Literal["mean", "trained_only", "weighted"]

WARMUP_SHARE = 0.2
"""Warm-up over all steps: the paper's guideline (Section IV.C), which all its runs follow."""


def full_phase(
    name: str, steps: int, every: int, wire: str, until: Until | None = None, merge: Merge = Mean()
) -> tuple[Phase, ...]:
    """A full-rank phase, or none if it has no steps: with merges every so many steps, or with shared gradients (0)."""
    if steps == 0:
        return ()
    sync: Sync = GradientSync() if every == 0 else WeightSync(every, merge, wire)
    return (Phase(name, steps, sync=sync, until=until),)


def at_local_lr(phases: tuple[Phase, ...], local_lr: float) -> tuple[Phase, ...]:
    """The phases with this `Phase.local_lr` where workers train alone between merges."""
    return tuple(replace(p, local_lr=local_lr) if isinstance(p.sync, WeightSync) else p for p in phases)


def merge_rule(name: MergeName, temperature: float) -> Merge:
    merges: dict[str, Merge] = {"mean": Mean(), "trained_only": TrainedOnly(), "weighted": Weighted(temperature)}
    if name not in merges:
        raise ConfigurationError(f"unknown merge {name!r}: {nearest(str(name), merges)}")
    return merges[name]


def rank_rule_of(rule: RankRule | str | None, sigma_cutoff: float, outliers: bool = True) -> RankRule:
    if isinstance(rule, str):
        return parse_rule(rule)
    return SigmaCutoff(sigma_cutoff, outliers=outliers) if rule is None else rule


def until(measure: Measure, below: float) -> Until | None:
    return Until(measure, below) if below != 0 else None


def whole_rounds(total_steps: int, every: int) -> int:
    """The guideline's warm-up in whole rounds, at least one where another one fits behind it."""
    if not (isinstance(total_steps, int) and isinstance(every, int) and 0 < every <= total_steps // 2):
        return 0
    return max(1, round(WARMUP_SHARE * total_steps / every)) * every


def share_of(steps: int, share: float, least: int = 1) -> int:
    # What is no number of steps is reported with the phase that has it, together with everything else.
    return max(least, round(share * steps)) if isinstance(steps, int) else least
