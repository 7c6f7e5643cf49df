"""Checkpoints of all workers, complete or not there at all."""

from abtrain.checkpoint.store import Saved, latest, save

__all__ = ["Saved", "latest", "save"]
