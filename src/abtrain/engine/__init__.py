"""The engine: what happens at which step of a run, and when."""
