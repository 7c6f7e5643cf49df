"""Replaces weights by low-rank factors. Works on tensors and modules only, without communication."""
