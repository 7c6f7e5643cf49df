"""Options and parts that the named recipes share."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import wraps
from typing import Annotated, Any, TypeVar

from abtrain.errors import ConfigurationError, nearest
from abtrain.recipes.factoring import RankRule
from abtrain.recipes.merges import BY_NAME, Mean, MergeRule, Weighted
from abtrain.recipes.numbers import MOST, whole_number_problems
from abtrain.recipes.phase import Phase
from abtrain.recipes.rank_rules import SigmaCutoff, parse_rule
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import GradientSync, WeightSync

WARMUP_SHARE = 0.2
"""Warm-up steps divided by all steps: the paper's guideline (Section IV.C), which all its runs follow."""

# Options with their types and their meanings for users.
Every = Annotated[int, "Steps between merges."]
PhaseEvery = Annotated[int, "Steps between merges in that phase; 0: gradients are averaged at every step."]
Merge = Annotated[
    MergeRule | str, "A rule of `abtrain.recipes.merges`, or its name: mean (the paper's), trained_only or weighted."
]
Temperature = Annotated[float, "Temperature of the rule `weighted`, in the units of the loss."]
OuterLR = Annotated[float, "Learning rate of the outer optimizer."]
OuterMomentum = Annotated[float, "Momentum of the outer optimizer."]
Wire = Annotated[str, "How merges are sent: see `abtrain.recipes.sync.WeightSync`."]
Delay = Annotated[int, "Training steps that a merge is hidden behind; training waits for the last merge of a phase."]
Fragments = Annotated[int, "Parts of the model that merge in turns; at the end of a phase all merge at once."]
LocalLR = Annotated[float, "Multiplies the learning rate between merges: see `abtrain.recipes.phase.Phase`."]
Rule = Annotated[
    RankRule | str | None, "Replaces `SigmaCutoff(sigma_cutoff)`: a rule, or its name such as energy:0.95."
]

_T = TypeVar("_T")


def preset(
    recipe: Callable[..., Recipe], name: str, about: str, fixed: Mapping[str, object], **defaults: object
) -> Callable[..., Recipe]:
    """A recipe function that calls another one with some options fixed and with other defaults.

    Its signature shows its own defaults, and leaves out the fixed options. Its docstring is `about`; `abtrain
    recipes` shows its first sentence. `recipe` takes the name of its result as the second argument.
    """

    @wraps(recipe)  # with the annotations, which declare the options
    def build(total_steps: int, **options: Any) -> Recipe:
        return recipe(total_steps, name, **fixed, **{**defaults, **options})

    signature = inspect.signature(recipe)
    kept = [one for one in signature.parameters.values() if one.name not in {"name", *fixed}]
    shown = [one.replace(default=defaults.get(one.name, one.default)) for one in kept]
    build.__name__ = build.__qualname__ = name
    build.__doc__ = about
    build.__signature__ = signature.replace(parameters=shown)  # type: ignore[attr-defined]  # unknown to the stubs
    return build


def full_phase(
    name: str, steps: int, every: int, wire: str, merge: MergeRule = Mean(), delay: int = 0, local_lr: float = 1.0
) -> tuple[Phase, ...]:
    """A full-rank phase that merges every `every` steps, or shares gradients (0); no phase if it has no steps.

    Raises:
        ConfigurationError: invalid settings that this phase ignores; the phase itself reports the others.
    """
    if steps == 0 or every == 0:
        found = whole_number_problems(f"{name}_every", every, least=0) + WeightSync(1, merge, wire).problems()
        found += whole_number_problems(f"{name}_delay", delay, least=0)
        if found:
            raise ConfigurationError(found)
    if steps == 0:
        return ()
    if every == 0:
        return (Phase(name, steps, sync=GradientSync()),)
    return (Phase(name, steps, sync=WeightSync(every, merge, wire, delay), local_lr=local_lr),)


def merge_rule(rule: MergeRule | str, temperature: float) -> MergeRule:
    """The given rule, or a new one of the given name, with this temperature if the rule uses one.

    Raises:
        ConfigurationError: an unknown name, or an invalid temperature, even if the rule does not use it.
    """
    found = Weighted(temperature).problems()
    if not isinstance(rule, MergeRule) and str(rule) not in BY_NAME:
        found.append(f"unknown merge {rule!r}: {nearest(str(rule), BY_NAME)}")
    if found:
        raise ConfigurationError(found)
    if isinstance(rule, MergeRule):
        return rule
    kind = BY_NAME[str(rule)]
    return kind(**{field.name: temperature for field in fields(kind) if field.name == "temperature"})


def rank_rule_of(rule: RankRule | str | None, sigma_cutoff: float, outliers: bool = True) -> RankRule:
    """The given rule, or the cutoff if there is none.

    Raises:
        ConfigurationError: an unknown rule, or an invalid cutoff that the rule replaces.
    """
    cutoff = SigmaCutoff(sigma_cutoff, outliers=outliers)
    if rule is None:
        return cutoff
    if cutoff.problems():
        raise ConfigurationError(cutoff.problems())
    return parse_rule(rule) if isinstance(rule, str) else rule


def given_or(value: _T | None, default: _T) -> _T:
    return default if value is None else value


def whole_rounds(total_steps: int, every: int) -> int:
    """The guideline's warm-up, rounded to whole rounds: at least one if two rounds fit into the run, otherwise none."""
    if not (are_counts(total_steps, every) and 0 < every <= total_steps // 2):
        return 0
    return max(1, round(WARMUP_SHARE * total_steps / every)) * every


def share_of(steps: int, share: float, least: int = 1) -> int:
    return max(least, round(share * steps)) if are_counts(steps) else least


def are_counts(*values: object) -> bool:
    """Whether all are whole numbers of a usable size; the phase or recipe that gets another value reports it."""
    return all(isinstance(value, int) and abs(value) <= MOST for value in values)
