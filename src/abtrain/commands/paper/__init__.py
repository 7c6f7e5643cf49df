"""Reproduces the experiments, tables, figures and formulas of the paper (Coquelin et al., arXiv 2405.01067)."""
