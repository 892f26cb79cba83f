"""The counts and sizes of a config.json against what its tensors can hold.

A model is built from config.json before its tensors are looked at, so a count without bounds costs
minutes and gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.base.errors import UserError

LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers")
"""The names under which architectures keep the number of their blocks."""

_SIZES = (
    *("hidden_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)


def check_counts(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a config.json that asks for far more than the tensors can be.

    Small differences are left to whoever builds the model, who can name the tensor.

    Args:
        config: checked by `hf_config.read_config`.
        shapes: of all tensors, by name.

    Raises:
        UserError: naming the key, its value and what the tensors show.
    """
    blocks = 1 + max((_block(name) for name in shapes), default=-1)
    if blocks == 0:  # no name says its block
        blocks = len(shapes)
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for part in (config, config.get("text_config") or {}):
        for key in LAYERS:
            # Some architectures run a block several times.
            if isinstance(part.get(key), int) and part[key] > 2 * blocks + 16:
                raise UserError(
                    f"{folder / 'config.json'} says {key} is {part[key]}, and the tensors are of "
                    f"{blocks} blocks: fetch config.json again."
                )
        for key in _SIZES:
            # Vocabularies are padded here and there.
            if isinstance(part.get(key), int) and part[key] > 2 * largest:
                raise UserError(
                    f"{folder / 'config.json'} says {key} is {part[key]}, and no tensor has more "
                    f"than {largest} rows or columns: fetch config.json again."
                )


def _block(name: str) -> int:
    """The first number in a tensor's name, which is its block's; -1 without one."""
    found = re.search(r"(?:^|\.)(\d{1,9})(?:\.|$)", name)
    return int(found[1]) if found else -1
