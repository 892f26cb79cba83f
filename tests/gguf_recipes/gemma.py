"""Tiny GGUFs of gemma."""

from __future__ import annotations

from tests.tiny_gguf import Recipe

RECIPES: dict[str, Recipe] = {}
