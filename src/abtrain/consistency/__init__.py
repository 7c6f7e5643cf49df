"""Consistency between workers: compares what they hold, and makes it equal."""
