"""Implements the wire formats of merges: encodes and sends tensors, and averages them over workers of different groups."""
