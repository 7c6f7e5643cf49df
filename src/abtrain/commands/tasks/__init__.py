"""Defines tasks on real data: their models, samples and evaluation."""
