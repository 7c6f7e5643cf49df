"""Compares the settings, weights and optimizer state of workers, and makes the state equal."""
