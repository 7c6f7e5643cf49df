"""Implements the wire formats of merges: encodes and sends tensors, and averages them between groups."""
