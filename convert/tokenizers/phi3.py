"""Phi-3's name, by which llama.cpp knows how a vocabulary is to be read.

Where general.name says Phi-3, its special tokens swallow the white space after them; a vocabulary
that lacks Phi-3's other special tokens then fails to load (llama.cpp: src/llama-vocab.cpp, per
token attributes). So a file that is renamed must say Phi-3 exactly when it did before.
"""

from __future__ import annotations

import re


def says_phi3(name: str) -> bool:
    """Whether llama.cpp takes this general.name for Phi-3's."""
    return re.search(r"phi-?3", name, re.IGNORECASE) is not None


def named(name: str, *, phi3: bool) -> str:
    """``name``, changed as little as makes it say Phi-3, or not say it."""
    if says_phi3(name) == phi3:
        return name
    return f"{name} (phi-3)" if phi3 else re.sub(r"(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)
