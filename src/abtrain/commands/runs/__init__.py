"""Folders of runs that are not repeated: the settings of a run, whether it is done, and its results."""
