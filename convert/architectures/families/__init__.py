"""What each GGUF architecture is in mlx-lm: one module for each group of relatives."""

from __future__ import annotations

from convert.architectures.families import (
    cohere,
    deepseek,
    dense,
    gemma,
    gpt_oss,
    granite,
    lfm2,
    llama,
    phi,
    qwen,
)
from convert.architectures.families.family import Family

_GROUPS = (llama, qwen, gemma, phi, cohere, granite, dense, deepseek, gpt_oss, lfm2)

FAMILIES: dict[str, Family] = {
    family.architecture: family for group in _GROUPS for family in group.FAMILIES
}
"""general.architecture -> how mlx-lm runs it."""
