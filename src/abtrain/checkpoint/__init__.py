"""Checkpoints of all workers, written completely or not at all."""

from abtrain.checkpoint.store import Saved, latest, save

__all__ = ["Saved", "latest", "save"]
