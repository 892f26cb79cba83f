"""The command line: flags and commands, and messages for wrong calls."""
