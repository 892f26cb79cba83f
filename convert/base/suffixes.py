"""The ending of a file's name, which decides its format, in upper or lower case."""

from __future__ import annotations

from pathlib import Path

GGUF = ".gguf"
"""Of a GGUF: a model, a LoRA for one, or a control vector."""


def ends_in(path: Path, *suffixes: str) -> bool:
    """Whether a file's name ends in one of these suffixes, given in lower case."""
    return path.name.lower().endswith(suffixes)


def is_gguf_name(path: Path) -> bool:
    """Whether a name is that of a GGUF; whether there is such a file is not asked."""
    return ends_in(path, GGUF)


def without(name: str, suffix: str) -> str:
    """A file's name without the suffix, if it ends in it."""
    return name[: -len(suffix)] if name.lower().endswith(suffix) else name
