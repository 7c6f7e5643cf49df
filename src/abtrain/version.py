"""Defines the version of abtrain."""

__version__ = "0.1.0"
