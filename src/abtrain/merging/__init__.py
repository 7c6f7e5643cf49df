"""Merges the weights of workers: chooses tensors and times, averages their changes, and applies a rule."""
