"""Runs that are done once: what each was asked for, whether it is done, and how its results are read."""
