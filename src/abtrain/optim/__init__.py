"""Builds optimizers for a model's parameters by their place in it."""

from abtrain.optim.muon import Muon, Sharing, hidden_matrices, muon_and_adamw

__all__ = ["Muon", "Sharing", "hidden_matrices", "muon_and_adamw"]
