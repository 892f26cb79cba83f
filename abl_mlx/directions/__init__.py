"""Directions: measuring, choosing, saving and reading them."""
