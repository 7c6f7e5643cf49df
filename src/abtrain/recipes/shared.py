"""Defines options that several named recipes share, and builds the phases and rules that these options describe."""

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
from abtrain.recipes.options import only_declared
from abtrain.recipes.phase import Phase
from abtrain.recipes.rank_rules import SigmaCutoff, parse_rule
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import GradientSync, WeightSync

WARMUP_SHARE = 0.2
"""The length of the warm-up as a share of all steps, from the paper's guideline (Section IV.C)."""

# Options with their types and their meanings for users.
Every = Annotated[int, "Steps between merges."]
PhaseEvery = Annotated[int, "Steps between merges in this phase; 0: gradients are averaged at every step."]
Merge = Annotated[
    MergeRule | str, "A rule of `abtrain.recipes.merges`, or its name: mean (the paper's), trained_only or weighted."
]
Temperature = Annotated[float, "Temperature of the rule `weighted`, in the units of the loss."]
OuterLR = Annotated[float, "Learning rate of the outer optimizer."]
OuterMomentum = Annotated[float, "Momentum of the outer optimizer."]
Wire = Annotated[str, "Format in which merges are sent, such as int4: see `abtrain.recipes.wires`."]
Delay = Annotated[int, "Training steps during which a merge is sent; training waits for a phase's last merge."]
Fragments = Annotated[int, "Number of parts of the model that are merged in turn; a phase ends with a merge of all."]
OuterDevice = Annotated[
    str | None, "cpu: anchors, outer momentum and residuals are kept in host memory; default: beside the parameters."
]
Rule = Annotated[
    RankRule | str | None, "A rank rule to use instead of `sigma_cutoff`, or its name, such as energy:0.95."
]

_T = TypeVar("_T")


def preset(
    recipe: Callable[..., Recipe], name: str, about: str, fixed: Mapping[str, object], **defaults: object
) -> Callable[..., Recipe]:
    """Returns a recipe function that calls the function `recipe` with some options fixed and with other defaults.

    The new function's signature shows its own defaults, and leaves out the fixed options. Its docstring is `about`;
    `abtrain recipes` prints the first sentence. The second argument of `recipe` must be the name of the result.
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
    return only_declared(build)


def full_phase(
    name: str, steps: int, every: int, wire: str, merge: MergeRule = Mean(), delay: int = 0
) -> tuple[Phase, ...]:
    """Returns a full-rank phase in a tuple, empty if `steps` is 0. `every` 0 averages gradients instead of weights.

    Raises:
        ConfigurationError: a setting that the phase does not use is invalid. `Recipe` checks the settings in use.
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
    return (Phase(name, steps, sync=WeightSync(every, merge, wire, delay)),)


def merge_rule(rule: MergeRule | str, temperature: float) -> MergeRule:
    """Returns `rule`, or builds the rule with this name. Only the rule `weighted` uses `temperature`.

    Raises:
        ConfigurationError: the name is unknown, or the temperature is invalid, even if the rule does not use it.
    """
    found = Weighted(temperature).problems()
    if not isinstance(rule, MergeRule) and str(rule) not in BY_NAME:
        found.append(f"unknown merge rule {rule!r}: {nearest(str(rule), BY_NAME)}")
    if found:
        raise ConfigurationError(found)
    if isinstance(rule, MergeRule):
        return rule
    kind = BY_NAME[str(rule)]
    return kind(**{field.name: temperature for field in fields(kind) if field.name == "temperature"})


def rank_rule_of(rule: RankRule | str | None, sigma_cutoff: float, outliers: bool = True) -> RankRule:
    """Returns the given rank rule, or `SigmaCutoff(sigma_cutoff)` if it is None. Strings are parsed.

    Raises:
        ConfigurationError: the rule is unknown, or it replaces a `sigma_cutoff` that is invalid.
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
    """Returns the number of steps in the paper's warm-up, in whole rounds; 0 if the run has fewer than two rounds."""
    if not (are_counts(total_steps, every) and 0 < every <= total_steps // 2):
        return 0
    return max(1, round(WARMUP_SHARE * total_steps / every)) * every


def share_of(steps: int, share: float, least: int = 1) -> int:
    return max(least, round(share * steps)) if are_counts(steps) else least


def are_counts(*values: object) -> bool:
    """Returns whether all values are whole numbers from -`MOST` to `MOST`. `Phase` and `Recipe` report other values."""
    return all(isinstance(value, int) and abs(value) <= MOST for value in values)
