"""Notes: remarks that a reader of an output's figures should know.

A record keeps them under ``note``; the tables of all commands and the model cards show them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any


def joined(*notes: str | None) -> str | None:
    """Several notes joined into one; None where all are None."""
    return "; ".join(filter(None, notes)) or None


def noted(*notes: str | None) -> dict[str, str]:
    """The member ``note`` of a record with these notes; empty where all are None."""
    note = joined(*notes)
    return {} if note is None else {"note": note}


def lines(note: str | None) -> list[str]:
    """The line of a table that shows a note, if there is one."""
    return [f"  note: {note}"] if note else []


def drafting(tensors: Sequence[str]) -> str | None:
    """Note for a folder without the tensors of multi-token prediction that its GGUF has."""
    if not tensors:
        return None
    return (
        f"left out: {len(tensors)} tensors of multi-token prediction (such as {tensors[0]}), for "
        "which mlx-lm's models have no place"
    )


def window(config: Mapping[str, Any]) -> str | None:
    """Note for a folder whose model has sliding windows that mlx-lm does not apply.

    Args:
        config: the contents of its config.json.
    """
    if config.get("model_type") != "gemma2":
        return None
    tokens = config.get("sliding_window")
    return (
        f"every other layer of Gemma 2 attends to the last {tokens} tokens only: abl-mlx does so, "
        "mlx-lm itself attends to all, so that its replies to longer prompts differ"
    )


def tower(name: str, tensors: int) -> str:
    """Note for a GGUF with the vision tower of its folder beside it, in the file ``name``."""
    return f"the vision tower ({tensors} tensors) is in {name}, unedited"


def came_along(names: Sequence[str]) -> str | None:
    """Note for a GGUF with copies of its source's further files beside it."""
    return f"with it come {', '.join(names)}, as they were" if names else None


def no_projector(names: Sequence[str]) -> str | None:
    """Note for an MLX folder that was made of a GGUF with projectors: they have no place in it."""
    if not names:
        return None
    return f"pictures and sound are left out: an MLX folder has no place for {', '.join(names)}"


def no_tower(tensors: Sequence[str], why: str) -> str:
    """Note for a GGUF without the vision tower that its folder has.

    Args:
        tensors: the tower's tensors.
        why: the reason, as a part of a sentence.
    """
    return (
        f"left out: {len(tensors)} tensors of the vision tower (such as {tensors[0]}): {why}; "
        "llama.cpp takes pictures by an mmproj GGUF of its own, which its own converters write"
    )


def repacked(forms: Mapping[str, str]) -> str | None:
    """Note for a GGUF of a quantized folder: ``forms`` says of each tensor how it was written."""
    counts = Counter(forms.values())
    return ", ".join(f"{count} matrices {form}" for form, count in counts.most_common()) or None


def modelfile(lost: Sequence[str]) -> str | None:
    """Note for a Modelfile whose TEMPLATE lacks a part of the model's own template."""
    if not lost:
        return None
    return (
        f"the Modelfile's TEMPLATE has no {' and no '.join(lost)}: Ollama before 0.30 will not "
        "offer them, newer ones go by the model's own template"
    )


def quantized_again(tensors: int) -> str | None:
    """Note for a GGUF with tensors that were quantized before and have another type now."""
    if not tensors:
        return None
    return (
        f"{tensors} tensors were quantized already and lost precision again: quantize the float "
        "model, or let them be with --keep-types"
    )


def not_copied(files: Sequence[str]) -> str | None:
    """Note for a folder without those files of the source that hold unedited weights."""
    if not files:
        return None
    listed = ", ".join(files[:_NAMED]) + (", ..." if len(files) > _NAMED else "")
    return f"not copied, as they hold weights that were not edited: {listed}"


#: How many files a note names at most.
_NAMED = 4
