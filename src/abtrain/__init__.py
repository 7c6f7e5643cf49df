"""abtrain: train PyTorch models on machines joined by slow links.

A model, an optimizer and a loop stay as they are; a recipe says what the weights look like, what is trained and how
the workers agree. The recipes implement AB-training (Coquelin et al., arXiv 2405.01067) and the methods it is compared
with.
"""

from abtrain import recipes
from abtrain.engine import ABTraining
from abtrain.errors import AbtrainError
from abtrain.export import weights_digest
from abtrain.lowrank.rank import Energy, FixedRank, SigmaCutoff
from abtrain.recipe import Factoring, GradientSync, Phase, Recipe, WeightSync

__version__ = "0.1.0"

__all__ = [
    "ABTraining",
    "AbtrainError",
    "Energy",
    "Factoring",
    "FixedRank",
    "GradientSync",
    "Phase",
    "Recipe",
    "SigmaCutoff",
    "WeightSync",
    "recipes",
    "weights_digest",
]
