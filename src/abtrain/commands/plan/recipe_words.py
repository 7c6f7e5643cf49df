"""Describes recipes and their phases in words."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from abtrain import recipes
from abtrain.recipes.options import written
from abtrain.recipes.phase import Phase
from abtrain.recipes.recipe import Recipe
from abtrain.recipes.sync import GradientSync, Sync, WeightSync
from abtrain.recipes.wires import AUTO, AUTO_WIRES, parse_wire

TRAINS = {
    "all": "all train A and B",
    "a_or_b": "half train A, half B",
    "a_then_b": "all train A and B in turns",
    "b": "all train B",
}
GRADIENT_WIRES = {
    "fp32": "gradients averaged at every step",
    "bf16": "gradients averaged at every step in bf16",
    "powersgd": "gradients averaged at every step as factors of rank {rank}",
}

_LONG_RUN = 10_000
"""A number of steps that is long enough for the defaults of every recipe."""


def purpose_of(name: str) -> str:
    """Returns the purpose of a recipe: the first sentence of its docstring."""
    return (inspect.getdoc(recipes.RECIPES[name]) or "").splitlines()[0]


class OptionInWords(NamedTuple):
    """The name, default and meaning of a recipe's option. The default is empty if it depends on other options."""

    name: str
    default: str
    meaning: str


def options_in_words(name: str) -> list[OptionInWords]:
    """Returns the options of a recipe in the order of the recipe's parameters."""
    recipe = recipes.RECIPES[name]
    signature, factoring = inspect.signature(recipe).parameters, recipe(_LONG_RUN).factoring
    found = []
    for option, (_, meaning) in recipes.options_of(name).items():
        default = signature[option].default if option in signature else getattr(factoring, option)
        found.append(OptionInWords(option, "" if default is None else written(default), meaning.replace("`", "")))
    return found


def phases_in_words(recipe: Recipe) -> list[str]:
    """Returns a line for each phase, with its name, its steps, the form of weights, the trained parts and the sync."""
    runs = Counter(position.phase_index for position in recipe.runs())
    lengths = {position.phase_index: position.steps_in_phase for position in reversed(list(recipe.runs()))}
    lines = []
    for index, phase in enumerate(recipe.phases):
        if runs[index]:
            times = f"{runs[index]} x " if runs[index] > 1 else ""
            lines.append(f"{phase.name}, {times}{lengths[index]:,} steps: {', '.join(_clauses(phase))}")
    return lines


def sync_in_words(sync: Sync) -> str:
    """Describes how workers synchronize: by averaging gradients or by merging weights."""
    if sync is None:
        return "never averaged"
    if isinstance(sync, GradientSync):
        return GRADIENT_WIRES[sync.wire].format(rank=sync.rank)
    often = "at every step" if sync.every == 1 else f"every {sync.every:,} steps"
    return f"merged {often} ({', '.join(_manner(sync))})"


def _manner(sync: WeightSync) -> Iterator[str]:
    """Yields phrases that describe how a merge is computed and sent."""
    yield sync.merge.words
    yield _sent(sync.wire)
    if sync.fragments > 1:
        yield f"{sync.fragments} fragments in turns"
    if sync.delay:
        yield f"hidden behind {sync.delay:,} steps"


def _sent(name: str) -> str:
    """Describes the format in which a merge is sent."""
    if name == AUTO:
        *some, last = (wire for _, wire in AUTO_WIRES)
        return f"{', '.join(some)} or {last}, by the number of workers"
    form, values = parse_wire(name)
    return form.words.format(**values)


def _clauses(phase: Phase) -> Iterator[str]:
    """Yields phrases that describe the weights, the trained parts and the synchronization of a phase."""
    yield "full" if phase.weights == "full" else TRAINS[phase.trains]
    if phase.damping:
        yield f"steps preconditioned (damping {phase.damping:g}, times {phase.factor_lr:g})"
    yield sync_in_words(phase.sync)
