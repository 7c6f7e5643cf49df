"""Studies: several recipes under the same conditions, and what came out side by side."""
