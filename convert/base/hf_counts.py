"""A check of the counts and sizes in a config.json against the shapes of the model's tensors.

mlx-lm builds a model from config.json before it looks at the tensors, so a count that is far too
large would cost minutes and gigabytes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.base.errors import UserError

LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "num_transformer_layers")
"""The keys of config.json under which architectures keep the number of their blocks."""

_SIZES = (
    *("hidden_size", "vocab_size", "head_dim", "num_attention_heads", "num_key_value_heads"),
    *("num_experts", "num_local_experts", "n_routed_experts"),
)


def check_counts(
    folder: Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Refuse a config.json whose counts are far larger than the tensors allow.

    Small differences are found later, by the code that builds the model and can name the tensor.

    Args:
        folder: the model's folder, for messages.
        config: as `hf_config.read_config` returned it.
        shapes: the shapes of all tensors, by name.

    Raises:
        UserError: naming the key, its value and what the tensors show.
    """
    blocks = 1 + max((_block(name) for name in shapes), default=-1)
    if blocks == 0:  # no tensor's name has a block's number
        blocks = len(shapes)
    largest = max((size for shape in shapes.values() for size in shape), default=0)
    for part in (config, config.get("text_config") or {}):
        for key in LAYERS:
            # The factor of 2: some architectures run a block several times.
            if isinstance(part.get(key), int) and part[key] > 2 * blocks + 16:
                raise UserError(
                    f"{folder / 'config.json'} says {key} is {part[key]}, but the tensors are of "
                    f"{blocks} blocks: fetch config.json again."
                )
        for key in _SIZES:
            # The factor of 2: some vocabularies are padded.
            if isinstance(part.get(key), int) and part[key] > 2 * largest:
                raise UserError(
                    f"{folder / 'config.json'} says {key} is {part[key]}, but no tensor has more "
                    f"than {largest} rows or columns: fetch config.json again."
                )


def _block(name: str) -> int:
    """The first number in a tensor's name, which is its block's; -1 where there is none."""
    found = re.search(r"(?:^|\.)(\d{1,9})(?:\.|$)", name)
    return int(found[1]) if found else -1
