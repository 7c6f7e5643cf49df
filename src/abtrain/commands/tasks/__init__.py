"""Tasks on real data: models, samples, and how they are evaluated."""
