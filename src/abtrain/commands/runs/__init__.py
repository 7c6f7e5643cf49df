"""Keeps a folder for each run, so that finished runs are not repeated: its settings, its state and its results."""
