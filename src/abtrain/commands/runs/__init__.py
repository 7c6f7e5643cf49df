"""Keeps the settings, state and results of each run in a folder, so that finished runs are not repeated."""
