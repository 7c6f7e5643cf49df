"""The trainer behind `abtrain train`: tasks on real data, the loop, the launcher, the run folder."""
