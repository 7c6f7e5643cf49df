"""Merges: which tensors, when, by which rule, over which wire."""
