"""Merges the weights of workers: selects tensors and times, averages over a wire, and applies a rule."""
