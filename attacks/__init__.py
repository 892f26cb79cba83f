"""Attacks on abl-mlx: damaged and hostile input for every command that reads something.

``python -m attacks --minutes 60`` puts mutated inputs of every kind through the command that reads
them and counts what came of it. README.md beside this file says what counts as a fault.
"""
