"""abtrain: train PyTorch models on machines joined by slow links.

The model, optimizer and training loop stay unchanged. A recipe sets which weights are replaced by low-rank factors,
which parameters are trained, and how workers synchronize. The recipes are AB-training (Coquelin et al., arXiv
2405.01067) and methods to compare it with.
"""

import importlib
from typing import TYPE_CHECKING, Any

from abtrain.notices import show_by_default as _show_by_default
from abtrain.version import __version__ as __version__

if TYPE_CHECKING:
    from abtrain import checkpoint, errors, optim, recipes
    from abtrain.checkpoint.digest import weights_digest
    from abtrain.engine.ab_training import ABTraining
    from abtrain.errors import AbtrainError
    from abtrain.lowrank.compress import compress
    from abtrain.lowrank.model_file import load
    from abtrain.lowrank.plain import to_plain
    from abtrain.recipes.factoring import Factoring
    from abtrain.recipes.merges import Mean, Outer, TrainedOnly
    from abtrain.recipes.phase import Phase
    from abtrain.recipes.rank_rules import Energy, FixedRank, ParameterShare, SigmaCutoff, StableRank
    from abtrain.recipes.recipe import Recipe
    from abtrain.recipes.sync import GradientSync, WeightSync

__all__ = [
    "ABTraining",
    "AbtrainError",
    "Energy",
    "Factoring",
    "FixedRank",
    "GradientSync",
    "Mean",
    "Outer",
    "ParameterShare",
    "Phase",
    "Recipe",
    "SigmaCutoff",
    "StableRank",
    "TrainedOnly",
    "WeightSync",
    "checkpoint",
    "compress",
    "errors",
    "load",
    "optim",
    "recipes",
    "to_plain",
    "weights_digest",
]

_show_by_default()

_HOMES = {
    "ABTraining": "engine.ab_training",
    "AbtrainError": "errors",
    "compress": "lowrank.compress",
    "load": "lowrank.model_file",
    "to_plain": "lowrank.plain",
    "weights_digest": "checkpoint.digest",
    **dict.fromkeys(("Energy", "FixedRank", "ParameterShare", "SigmaCutoff", "StableRank"), "recipes.rank_rules"),
    "Factoring": "recipes.factoring",
    "Phase": "recipes.phase",
    "Recipe": "recipes.recipe",
    **dict.fromkeys(("Mean", "Outer", "TrainedOnly"), "recipes.merges"),
    **dict.fromkeys(("GradientSync", "WeightSync"), "recipes.sync"),
}


def __getattr__(name: str) -> Any:
    # Lazy imports: torch takes seconds to load, and `abtrain --help` must not.
    if name in ("checkpoint", "errors", "optim", "recipes"):
        return importlib.import_module(f"abtrain.{name}")
    if name in _HOMES:
        return getattr(importlib.import_module(f"abtrain.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'abtrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
