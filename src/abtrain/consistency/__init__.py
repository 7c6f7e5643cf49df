"""Compares settings and weights between workers, and makes factors and optimizer state equal on all of them."""
