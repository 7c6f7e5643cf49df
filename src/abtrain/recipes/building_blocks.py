"""Parts that the named recipes share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.factoring import RankRule
from abtrain.recipes.merges import BY_NAME, Mean, MergeRule, Weighted
from abtrain.recipes.numbers import MOST, whole_number_problems
from abtrain.recipes.phase import Phase
from abtrain.recipes.rank_rules import SigmaCutoff, parse_rule
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import GradientSync, Sync, WeightSync

WARMUP_SHARE = 0.2
"""Warm-up over all steps: the paper's guideline (Section IV.C), which all its runs follow."""


def preset(
    recipe: Callable[..., Recipe], name: str, about: str, fixed: Mapping[str, object], **defaults: object
) -> Callable[..., Recipe]:
    """A recipe function that calls another one with some options fixed and with other defaults.

    Its signature shows its own defaults, and leaves out the fixed options.

    Args:
        recipe: builds the recipe, in the module of the preset; its second parameter, `name`, names the result.
        name: of the preset.
        about: its docstring; the first sentence is the listing's.
        fixed: values of the options that the preset does not take, by name.
        defaults: of options that it does take.
    """

    def build(total_steps: int, **options: Any) -> Recipe:
        return recipe(total_steps, name, **fixed, **{**defaults, **options})

    signature = inspect.signature(recipe)
    hidden = {"name", *fixed}
    kept = [one for one in signature.parameters.values() if one.name not in hidden]
    build.__name__ = build.__qualname__ = name
    build.__module__, build.__doc__ = recipe.__module__, about
    shown = signature.replace(parameters=[one.replace(default=defaults.get(one.name, one.default)) for one in kept])
    build.__signature__ = shown  # type: ignore[attr-defined]  # inspect.signature reads it, the stubs do not say so
    return build


def full_phase(
    name: str, steps: int, every: int, wire: str, merge: MergeRule = Mean(), delay: int = 0
) -> tuple[Phase, ...]:
    """A full-rank phase, or none if it has no steps: with merges every so many steps, or with shared gradients (0).

    Raises:
        ConfigurationError: settings that are ignored here and cannot be; the phase itself reports the others.
    """
    if steps == 0 or every == 0:
        found = whole_number_problems(f"{name}_every", every, least=0) + WeightSync(1, merge, wire).problems()
        found += whole_number_problems(f"{name}_delay", delay, least=0)
        if found:
            raise ConfigurationError(found)
    if steps == 0:
        return ()
    sync: Sync = GradientSync() if every == 0 else WeightSync(every, merge, wire, delay)
    return (Phase(name, steps, sync=sync),)


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


def whole_rounds(total_steps: int, every: int) -> int:
    """The guideline's warm-up in whole rounds, at least one where another one fits after it."""
    if not (are_counts(total_steps, every) and 0 < every <= total_steps // 2):
        return 0
    return max(1, round(WARMUP_SHARE * total_steps / every)) * every


def share_of(steps: int, share: float, least: int = 1) -> int:
    return max(least, round(share * steps)) if are_counts(steps) else least


def are_counts(*values: object) -> bool:
    """Whether all can be calculated with; those that cannot are reported with the phase that has them."""
    return all(isinstance(value, int) and abs(value) <= MOST for value in values)
