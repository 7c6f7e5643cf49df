"""The commands, built on the library."""
