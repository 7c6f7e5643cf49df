"""Wires: formats in which workers send their changes in a merge."""
