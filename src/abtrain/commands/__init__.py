"""The `abtrain` command and its subcommands."""
