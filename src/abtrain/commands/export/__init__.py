"""Uses the result of a run: exports its model, and inspects what its factors save."""
