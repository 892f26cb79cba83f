"""Attacks on abl-mlx: damaged and hostile input for every command that reads something.

``python -m attacks --minutes 60`` runs commands on mutated inputs of every kind and
counts the outcomes. README.md in this folder says what counts as a fault.
"""
