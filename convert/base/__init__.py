"""Helpers shared by all file formats: errors, new files, locks, JSON, threads and grids."""
