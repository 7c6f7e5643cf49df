"""abtrain: train PyTorch models on machines joined by slow links.

A model, an optimizer and a loop stay as they are; a recipe says what the weights look like, what is trained and how
the workers agree. The recipes implement AB-training (Coquelin et al., arXiv 2405.01067) and the methods it is compared
with.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abtrain import recipes
    from abtrain.engine import ABTraining
    from abtrain.errors import AbtrainError
    from abtrain.export import weights_digest
    from abtrain.factoring import Factoring
    from abtrain.lowrank.rank import Energy, FixedRank, SigmaCutoff
    from abtrain.phase import Phase
    from abtrain.recipe import Recipe
    from abtrain.sync import GradientSync, Mean, Outer, TrainedOnly, WeightSync

__version__ = "0.1.0"

__all__ = [
    "ABTraining",
    "AbtrainError",
    "Energy",
    "Factoring",
    "FixedRank",
    "GradientSync",
    "Mean",
    "Outer",
    "Phase",
    "Recipe",
    "SigmaCutoff",
    "TrainedOnly",
    "WeightSync",
    "recipes",
    "weights_digest",
]

_HOMES = {
    "ABTraining": "engine",
    "AbtrainError": "errors",
    "weights_digest": "export",
    **dict.fromkeys(("Energy", "FixedRank", "SigmaCutoff"), "lowrank.rank"),
    "Factoring": "factoring",
    "Phase": "phase",
    "Recipe": "recipe",
    **dict.fromkeys(("GradientSync", "Mean", "Outer", "TrainedOnly", "WeightSync"), "sync"),
}


def __getattr__(name: str) -> Any:
    # Names are imported when they are first used: torch takes seconds, and `abtrain --help` should not.
    if name == "recipes":
        return importlib.import_module("abtrain.recipes")
    if name in _HOMES:
        return getattr(importlib.import_module(f"abtrain.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'abtrain' has no attribute {name!r}")
