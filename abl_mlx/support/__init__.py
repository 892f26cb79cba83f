"""Helpers for all rooms: arrays, timing, interrupts, JSON and the terminal."""
