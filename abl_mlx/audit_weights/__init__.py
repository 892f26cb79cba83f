"""Detecting an edit from weights alone."""
