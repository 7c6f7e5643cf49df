"""What recipes are put together from."""

from __future__ import annotations

from dataclasses import fields, replace

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.factoring import RankRule
from abtrain.recipes.merges import BY_NAME, Mean, MergeRule, Weighted
from abtrain.recipes.numbers import MOST, whole_number_problems
from abtrain.recipes.phase import Measure, Phase, Until
from abtrain.recipes.rank_rules import SigmaCutoff, parse_rule
from abtrain.recipes.sync import GradientSync, Sync, WeightSync

WARMUP_SHARE = 0.2
"""Warm-up over all steps: the paper's guideline (Section IV.C), which all its runs follow."""


def full_phase(
    name: str,
    steps: int,
    every: int,
    wire: str,
    until: Until | None = None,
    merge: MergeRule = Mean(),
    delay: int = 0,
) -> tuple[Phase, ...]:
    """A full-rank phase, or none if it has no steps: with merges every so many steps, or with shared gradients (0).

    Raises:
        ConfigurationError: settings that play no part here cannot be; the phase itself tells of those that do.
    """
    if steps == 0 or every == 0:
        found = whole_number_problems(f"{name}_every", every, least=0) + WeightSync(1, merge, wire).problems()
        found += whole_number_problems(f"{name}_delay", delay, least=0)
        if steps == 0 and until is not None:
            found += until.problems()
        if found:
            raise ConfigurationError(found)
    if steps == 0:
        return ()
    sync: Sync = GradientSync() if every == 0 else WeightSync(every, merge, wire, delay)
    return (Phase(name, steps, sync=sync, until=until),)


def at_local_lr(phases: tuple[Phase, ...], local_lr: float) -> tuple[Phase, ...]:
    """The phases with this `Phase.local_lr` where workers train alone between merges."""
    return tuple(replace(p, local_lr=local_lr) if isinstance(p.sync, WeightSync) else p for p in phases)


def merge_rule(rule: MergeRule | str, temperature: float) -> MergeRule:
    """A rule, or the one of that name with the settings that it has of those given here.

    Args:
        rule: which may have been built already.
        temperature: of rules that have one; checked for all.

    Raises:
        ConfigurationError: an unknown name, or a temperature that cannot be.
    """
    found = Weighted(temperature).problems()
    if not isinstance(rule, MergeRule) and str(rule) not in BY_NAME:
        found.append(f"unknown merge {rule!r}: {nearest(str(rule), BY_NAME)}")
    if found:
        raise ConfigurationError(found)
    if isinstance(rule, MergeRule):
        return rule
    kind = BY_NAME[str(rule)]
    settings = {"temperature": temperature}
    return kind(**{field.name: settings[field.name] for field in fields(kind) if field.name in settings})


def rank_rule_of(rule: RankRule | str | None, sigma_cutoff: float, outliers: bool = True) -> RankRule:
    """The rule that was given, or the cutoff, which is looked at whether or not it plays a part."""
    cutoff = SigmaCutoff(sigma_cutoff, outliers=outliers)
    if rule is not None and cutoff.problems():
        raise ConfigurationError(cutoff.problems())
    if isinstance(rule, str):
        return parse_rule(rule)
    return cutoff if rule is None else rule


def until(measure: Measure, below: float) -> Until | None:
    return Until(measure, below) if below != 0 else None


def whole_rounds(total_steps: int, every: int) -> int:
    """The guideline's warm-up in whole rounds, at least one where another one fits behind it."""
    if not (are_counts(total_steps, every) and 0 < every <= total_steps // 2):
        return 0
    return max(1, round(WARMUP_SHARE * total_steps / every)) * every


def share_of(steps: int, share: float, least: int = 1) -> int:
    return max(least, round(share * steps)) if are_counts(steps) else least


def are_counts(*values: object) -> bool:
    """Whether all can be calculated with; those that cannot are reported with the phase that has them."""
    return all(isinstance(value, int) and abs(value) <= MOST for value in values)
