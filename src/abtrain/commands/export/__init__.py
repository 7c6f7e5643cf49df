"""Exports the model of a finished run, and shows what its factors save."""
