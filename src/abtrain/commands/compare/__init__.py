"""Recipes side by side in the lab, and the report."""
