"""Wires: ways to send a merge."""
