"""The engine carries out a recipe inside the user's training loop."""

from abtrain.engine.ab_training import ABTraining

__all__ = ["ABTraining"]
