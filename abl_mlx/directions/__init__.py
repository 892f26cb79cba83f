"""Directions: measuring, choosing, keeping and reading them."""
