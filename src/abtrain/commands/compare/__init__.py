"""Compares recipes in the lab, and writes a report."""
