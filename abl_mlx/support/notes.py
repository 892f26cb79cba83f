"""Notes: what a reader of an output's figures should know beside them.

A record keeps them under ``note``; every command's table and every card shows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def joined(*notes: str | None) -> str | None:
    """Several notes as one; None where there is nothing to say."""
    return "; ".join(filter(None, notes)) or None


def noted(*notes: str | None) -> dict[str, str]:
    """What a record gains by these notes."""
    note = joined(*notes)
    return {} if note is None else {"note": note}


def lines(note: str | None) -> list[str]:
    """The line of a table that shows a note, if there is one."""
    return [f"  note: {note}"] if note else []


def drafting(tensors: Sequence[str]) -> str | None:
    """What to say of a folder that lacks tensors of multi-token prediction that the GGUF has."""
    if not tensors:
        return None
    return (
        f"left out: {len(tensors)} tensors of multi-token prediction (such as {tensors[0]}), for "
        "which mlx-lm's models have no place"
    )


def window(config: Mapping[str, Any]) -> str | None:
    """What to say of a folder whose model looks back over a window that mlx-lm does not know.

    Args:
        config: of its config.json.
    """
    if config.get("model_type") != "gemma2":
        return None
    tokens = config.get("sliding_window")
    return (
        f"every other layer of Gemma 2 looks back over {tokens} tokens: abl-mlx does so, mlx-lm "
        "itself looks back over all, so that its replies to longer prompts differ"
    )


def vision(tensors: Sequence[str]) -> str | None:
    """What to say of a GGUF that lacks the vision tower that its folder has."""
    if not tensors:
        return None
    return (
        f"left out: {len(tensors)} tensors of the vision tower (such as {tensors[0]}): llama.cpp "
        "takes pictures by an mmproj GGUF of its own, which its convert_hf_to_gguf.py writes"
    )


def modelfile(lost: Sequence[str]) -> str | None:
    """What to say of a Modelfile whose TEMPLATE lacks what the model's own template has."""
    if not lost:
        return None
    return (
        f"the Modelfile's TEMPLATE has no {' and no '.join(lost)}, which the model's own template "
        "has: Ollama will not offer them; the Modelfile says what to do"
    )


def not_copied(files: Sequence[str]) -> str | None:
    """What to say of a folder without the source's files that hold unedited weights."""
    if not files:
        return None
    listed = ", ".join(files[:_NAMED]) + (", ..." if len(files) > _NAMED else "")
    return f"not copied, as they hold weights that were not edited: {listed}"


#: How many files are named.
_NAMED = 4
