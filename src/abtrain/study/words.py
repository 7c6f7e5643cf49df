"""What the phases of a recipe do, in words."""

from __future__ import annotations

import inspect
from collections import Counter

from abtrain import recipes
from abtrain.recipe import Phase, Recipe
from abtrain.sync import GradientSync, Mean, Outer, Sync, TrainedOnly

TRAINS = {
    "all": "all train A and B",
    "a_or_b": "half train A, half B",
    "b": "all train B",
}
MERGES: dict[type, str] = {
    Mean: "mean",
    TrainedOnly: "mean over those that trained it",
    Outer: "outer Nesterov",
}
GRADIENT_WIRES = {
    "fp32": "gradients averaged at every step",
    "bf16": "gradients averaged at every step in bf16",
    "powersgd": "gradients averaged at every step as factors of rank {rank}",
}


def purpose_of(name: str) -> str:
    """The first sentence of what a recipe says of itself."""
    return (inspect.getdoc(recipes.RECIPES[name]) or "").splitlines()[0]


def phases_in_words(recipe: Recipe) -> list[str]:
    """A line for each phase, in their order: name, how often and how long, weights, what is trained, sync."""
    runs = Counter(position.phase_index for position in recipe.runs())
    lengths = {position.phase_index: position.steps_in_phase for position in reversed(list(recipe.runs()))}
    lines = []
    for index, phase in enumerate(recipe.phases):
        if runs[index]:
            times = f"{runs[index]} x " if runs[index] > 1 else ""
            lines.append(f"{phase.name}, {times}{lengths[index]:,} steps: {_what(phase)}, {sync_in_words(phase.sync)}")
    return lines


def sync_in_words(sync: Sync) -> str:
    """How workers agree."""
    if sync is None:
        return "never averaged"
    if isinstance(sync, GradientSync):
        return GRADIENT_WIRES[sync.wire].format(rank=sync.rank)
    often = "at every step" if sync.every == 1 else f"every {sync.every:,} steps"
    return f"merged {often} ({MERGES[type(sync.merge)]}, {sync.wire})"


def _what(phase: Phase) -> str:
    return "full" if phase.weights == "full" else TRAINS[phase.trains]
