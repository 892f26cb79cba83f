"""Inputs: models by name, and prompt sets."""
