"""Saves the states of all workers, completely or not at all, and computes digests of weights."""

from abtrain.checkpoint.store import Saved, latest, save

__all__ = ["Saved", "latest", "save"]
