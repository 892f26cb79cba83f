"""Which architecture a folder's config.json becomes in a GGUF, and its language model's keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.architectures.hf_keys import Config
from convert.architectures.table import FROM_FOLDER, Written
from convert.base.errors import UserError
from convert.base.hf_config import fill_in


def text_config(config: Config) -> dict[str, Any]:
    """The language model's part of a config.json as one flat object with mlx-lm's keys.

    Multimodal configs keep that part under text_config. Keys that transformers 5 renamed are added.
    """
    known = next(iter(FROM_FOLDER.get(str(config.get("model_type")), ())), None)
    return {**(known.folder.defaults if known else {}), **fill_in(_merged(config))}


def _merged(config: Config) -> dict[str, Any]:
    flat = dict(config)
    nested = flat.pop("text_config", None)
    if isinstance(nested, Mapping):
        kept = {key: value for key, value in nested.items() if key != "model_type"}
        flat = {**flat, **kept, "text_model_type": nested.get("model_type")}
    return flat


def architecture(config: Config) -> Written:
    """The architecture that a folder with this config.json becomes.

    Raises:
        UserError: when the model_type is not supported, naming it and those that are.
    """
    model_type = str(config.get("model_type"))
    flat = _merged(config)
    for one in FROM_FOLDER.get(model_type, ()):
        if one.folder.when(flat):
            return one
    raise UserError(
        f'config.json says model_type "{model_type}", which cannot be written as GGUF '
        f"{'in this form' if model_type in FROM_FOLDER else 'yet'}; supported are "
        f"{', '.join(FROM_FOLDER)}. llama.cpp's convert_hf_to_gguf.py may know it."
    )
