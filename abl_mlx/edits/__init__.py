"""Edits: their effect on weights, rounding that preserves it, and the same at runtime."""
