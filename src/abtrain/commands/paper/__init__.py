"""The paper's experiments, tables, figures and arithmetic (Coquelin et al., arXiv 2405.01067)."""
