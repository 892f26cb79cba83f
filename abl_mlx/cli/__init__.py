"""The command line: flags and commands, and what a wrong one is told."""
