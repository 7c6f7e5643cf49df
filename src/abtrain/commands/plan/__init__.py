"""Predictions: what recipes send, how long that takes, and whether it pays."""
