"""Suffixes of files' names, which decide a file's format, in upper or lower case."""

from __future__ import annotations

from pathlib import Path

GGUF = ".gguf"
"""Suffix of a GGUF file: a model, a LoRA adapter, or a control vector."""


def ends_in(path: Path, *suffixes: str) -> bool:
    """Whether a file's name ends in one of these suffixes, which are given in lower case."""
    return path.name.lower().endswith(suffixes)


def is_gguf_name(path: Path) -> bool:
    """Whether a path is named like a GGUF file; the file need not exist."""
    return ends_in(path, GGUF)


def without(name: str, suffix: str) -> str:
    """A file's name without this suffix; the name as it is if it has another."""
    return name[: -len(suffix)] if name.lower().endswith(suffix) else name
