"""Recipes of tiny GGUFs, one module for each module of `convert.architectures.families`."""

from __future__ import annotations

from tests.support.gguf_recipes import (
    cohere,
    deepseek,
    dense,
    gemma,
    gpt_oss,
    granite,
    lfm2,
    llama,
    llama4,
    phi,
    qwen,
    qwen_vl,
)
from tests.support.tiny_gguf import Recipe

_GROUPS = (
    llama,
    llama4,
    qwen,
    qwen_vl,
    gemma,
    phi,
    cohere,
    granite,
    dense,
    deepseek,
    gpt_oss,
    lfm2,
)

RECIPES: dict[str, Recipe] = {
    name: recipe for group in _GROUPS for name, recipe in group.RECIPES.items()
}
"""What the test calls a model -> how it is made."""
