"""The paper (Coquelin et al., arXiv 2405.01067): its experiments, its tables and figures, and its arithmetic."""
