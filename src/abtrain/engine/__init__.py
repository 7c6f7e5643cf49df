"""The engine: what happens at which step of a run, and when."""

from abtrain.engine.ab_training import ABTraining

__all__ = ["ABTraining"]
