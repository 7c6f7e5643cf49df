"""Wires send tensors in a merge, each in a format of its own, and average them."""
