"""Errors, files, JSON and numbers, of no format in particular."""
