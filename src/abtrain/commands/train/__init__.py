"""`abtrain train`: the settings, the launcher and its workers, the training loop, and the run folder."""
