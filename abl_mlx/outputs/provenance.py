"""The label and metadata of a written model: what was edited, and from which model it comes.

Other people may read them, so they name the source by its Hugging Face id or its name, never by a
path.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abl_mlx import __version__
from abl_mlx.choices import Editing, Writing
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs.sources import Source
from convert.architectures.model_card import card_keys
from convert.tokenizers import phi3

TAGS = ["abliterated", "abl-mlx"]

_REMOVED = "the refusal direction was orthogonalized out of this model's weights"
_UNREAD = "the layers of this model no longer read its residual stream along the refusal direction"
_UNROUTED = "the routers of this model send fewer tokens to some experts of harmful prompts"
_UPDATED = "what some of this model's MLPs do with harmful prompts was changed"


def label(what: str, direction_sha256: str, source: Source) -> dict[str, Any]:
    """The first entries of every label in a written model's metadata.

    Args:
        what: describes the change in words.
        direction_sha256: the hash of the directions.
        source: the source model.
    """
    return {
        "edited": what,
        "version": __version__,
        "base_model": source.public_name,
        "direction_sha256": direction_sha256,
    }


def edit_label(
    direction: DirectionFile, editing: Editing, writing: Writing, source: Source, *, embedding: bool
) -> dict[str, Any]:
    """The label in which a written model describes its edit.

    Args:
        direction: the directions that were removed.
        editing: the chosen options of the edit.
        writing: the options of writing.
        source: the source model.
        embedding: whether the edit changed an embedding.
    """
    updates = direction.updates
    recipe = direction.metadata.get("recipe") if editing.kind == "project" else None
    what = {"readers": _UNREAD, "routers": _UNROUTED}.get(editing.edit, _REMOVED)
    if updates is not None:
        what = _UPDATED
    layers = "all" if editing.layers is None else ",".join(map(str, sorted(editing.layers)))
    return {
        **label(what, direction.sha256, source),
        "strength": editing.alpha,
        "layers": layers,
        "embedding": embedding,
        **({"updates": ",".join(map(str, sorted(updates)))} if updates is not None else {}),
        **({"kind": editing.kind} if editing.kind != "project" else {}),
        **({"edit": editing.edit} if editing.edit != "writers" else {}),
        **({"heads": editing.heads} if editing.heads is not None else {}),
        **({"experts": editing.experts} if editing.experts is not None else {}),
        **({"norm": editing.norm} if editing.norm != "none" else {}),
        **({"pin": editing.pin} if editing.pin is not None else {}),
        **({"recipe": json.dumps(recipe)} if recipe else {}),
        **({"mtp": True} if writing.mtp else {}),
        **({"tensors": writing.tensors} if writing.tensors is not None else {}),
    }


def gguf_metadata(
    source: Source,
    label: Mapping[str, Any],
    known: Mapping[str, Any] | None = None,
    *,
    suffix: str = "abliterated",
    tags: Sequence[str] = TAGS,
) -> dict[str, Any]:
    """The keys of a written GGUF that name it, its base model, and what was done.

    Args:
        source: the source model.
        label: the values of the keys ``abl_mlx.*``.
        known: the metadata of the source, if that is a GGUF; None for a folder, whose card is read.
        suffix: added to the base model's name.
        tags: added to its tags.
    """
    said: Mapping[str, Any] = card_keys(source.path) if known is None else known
    name = str(said.get("general.name") or source.title)
    new = f"{name}-{suffix}"
    if known is not None:
        new = phi3.named(new, phi3=phi3.says_phi3(str(said.get("general.name") or "")))
    index = int(said.get("general.base_model.count", 0))
    base = f"general.base_model.{index}"
    keys: dict[str, Any] = {
        "general.name": new,
        "general.tags": tagged(said, tags),
        "general.base_model.count": index + 1,
        f"{base}.name": name,
    }
    if source.hub_id is not None:
        keys[f"{base}.organization"] = source.hub_id.split("/")[0]
        keys[f"{base}.repo_url"] = f"https://huggingface.co/{source.hub_id}"
    for key in ("organization", "version", "repo_url"):
        if f"general.{key}" in said:
            keys[f"{base}.{key}"] = said[f"general.{key}"]
    return keys | {f"abl_mlx.{key}": value for key, value in label.items()}


def tagged(known: Mapping[str, Any], tags: Sequence[str] = TAGS) -> list[str]:
    """The tags in a model's metadata, and those of ``tags`` that are not among them."""
    old = known.get("general.tags") or []
    return [*old, *(tag for tag in tags if tag not in old)]


def without_home(value: Any) -> Any:
    """A record in which paths in the home folder begin with ``~``, which hides the user's name."""
    if isinstance(value, Mapping):
        return {key: without_home(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_home(one) for one in value]
    home = f"{Path.home()}{os.sep}"
    if isinstance(value, str) and value.startswith(home) and home != os.sep:
        return f"~{os.sep}{value.removeprefix(home)}"
    return value
