"""Names that make llama.cpp treat a GGUF as a Phi-3.

Where general.name contains Phi-3's name, llama.cpp makes special tokens swallow the white space
after them, and refuses a vocabulary without Phi-3's other special tokens (src/llama-vocab.cpp, per
token attributes). So a new general.name must contain that name exactly if the old one did.
"""

from __future__ import annotations

import re


def says_phi3(name: str) -> bool:
    """Whether llama.cpp treats a file with this general.name as a Phi-3."""
    return re.search(r"phi-?3", name, re.IGNORECASE) is not None


def named(name: str, *, phi3: bool) -> str:
    """``name``, changed as little as possible so that it says Phi-3 exactly if ``phi3``."""
    if says_phi3(name) == phi3:
        return name
    return f"{name} (phi-3)" if phi3 else re.sub(r"(phi)-?3", r"\1 3", name, flags=re.IGNORECASE)
