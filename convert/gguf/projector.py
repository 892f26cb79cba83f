"""GGUF files beside a model's own that turn pictures or sound into its tokens (mmproj files)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.base.errors import UserError
from convert.base.suffixes import is_gguf_name
from convert.gguf.file import metadata


def is_projector(keys: Mapping[str, Any]) -> bool:
    """Whether the metadata are those of a projector, as Ollama and llama.cpp tell them apart."""
    if keys.get("general.type") in ("mmproj", "projector"):
        return True
    return keys.get("general.architecture") == "clip" and any(
        keys.get(f"clip.has_{sense}_encoder") for sense in ("vision", "audio")
    )


def beside(gguf: Path, width: int) -> list[Path]:
    """The projectors in a GGUF's folder that fit a model, sorted by name.

    Args:
        gguf: the model's file, or any part of it.
        width: the width of the model's residual stream, which a projector's outputs must have.
    """
    found = []
    for path in sorted(gguf.absolute().parent.iterdir()):
        # By its name first: a folder may hold many large models.
        if "mmproj" not in path.name.lower() or not is_gguf_name(path) or not path.is_file():
            continue
        if fits(path, width):
            found.append(path)
    return found


def fits(path: Path, width: int) -> bool:
    """Whether a GGUF is a projector whose outputs have the width of a model's residual stream."""
    try:
        keys = metadata(path)
    except UserError:
        return False  # a damaged file is none of this model's
    widths = {keys.get(f"clip.{sense}.projection_dim") for sense in ("vision", "audio")}
    return is_projector(keys) and width in widths
