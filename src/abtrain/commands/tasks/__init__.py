"""Tasks on real data: models, samples and evaluation."""
