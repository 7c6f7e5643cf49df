"""Low-rank factors of weights: tensors and modules only, no communication."""
