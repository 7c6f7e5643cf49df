"""Keeps settings, state and results of each run in a folder. Finished runs are therefore not repeated."""
