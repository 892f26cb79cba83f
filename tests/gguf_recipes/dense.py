"""Tiny GGUFs of dense."""

from __future__ import annotations

from tests.tiny_gguf import Recipe

RECIPES: dict[str, Recipe] = {}
