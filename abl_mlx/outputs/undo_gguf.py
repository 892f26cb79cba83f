"""Undoes the edit of a GGUF, by writing the file again or by writing an adapter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.outputs import adapter_outputs
from abl_mlx.outputs.edit_label import Label
from abl_mlx.outputs.gguf_plan import stored_values
from abl_mlx.outputs.provenance import TAGS
from abl_mlx.outputs.undo_file import Taken
from abl_mlx.outputs.undo_weights import (
    ADAPTER_NAME,
    low_rank,
    missing_share,
    refuse_biases,
    refuse_readers,
)
from convert import adapters
from convert.adapters import Adapter
from convert.base.atomic import new_file
from convert.base.errors import UserError
from convert.gguf import ggml_types
from convert.gguf.file import GgufSource
from convert.gguf.rewrite import Replacement, rewrite


def write(gguf: GgufSource, path: Path, found: Mapping[str, Taken]) -> float:
    """Write the GGUF as it was before its edit.

    Args:
        gguf: the open edited file.
        path: where it is written.
        found: tensor name -> the components that the edit removed.

    Returns:
        The share of the removed components that is missing from the written weights.
    """
    files = rewrite(
        gguf,
        path,
        tensors={name: _replacement(gguf, name, one) for name, one in found.items()},
        metadata=_metadata(gguf),
    )
    with GgufSource(files[0]) as after:
        return missing_share(
            found, lambda name: stored_values(gguf, name), lambda name: stored_values(after, name)
        )


def _replacement(gguf: GgufSource, name: str, one: Taken) -> Replacement:
    entry = gguf.tensors[name]
    codec = ggml_types.codec(entry.type)
    assert isinstance(codec, ggml_types.FloatCodec)

    def chunks() -> Iterator[np.ndarray]:
        values = np.array(one.put_back(stored_values(gguf, name)).astype(mx.float32))
        yield codec.encode(codec.round(values.reshape(-1, values.shape[-1])))

    return Replacement(entry.type, entry.shape, chunks)


def write_adapter(gguf: GgufSource, path: Path, found: Mapping[str, Taken], label: Label) -> None:
    """Write a LoRA for llama.cpp that adds what the edit removed.

    Raises:
        UserError: when the edit changed a tensor to which llama.cpp applies no adapter.
    """
    refuse_biases(path, found)
    adapter_outputs.check_applied(gguf, found)
    tied = "output.weight" not in gguf.tensors
    refuse_readers(path, label)
    for name, one in found.items():
        if one.axis == -1 and (tied or not adapters.is_embedding(name)):
            # Without the head's part, the head would ignore what the layers write again.
            raise UserError(
                f"{path}: {name} was edited, to which llama.cpp applies no adapter"
                f"{', as it is the output head too' if tied else ''}; write the model instead."
            )
    changes = {name: low_rank(one, stored_values(gguf, name)) for name, one in found.items()}
    with new_file(path) as temporary:
        adapters.write_gguf(
            temporary, gguf.architecture, Adapter(1.0, changes), {"general.name": ADAPTER_NAME}
        )


def _metadata(gguf: GgufSource) -> dict[str, Any]:
    """The metadata without the keys that the edit added."""
    known = gguf.metadata
    changes: dict[str, Any] = {key: None for key in known if key.startswith("abl_mlx.")}
    name = known.get("general.name")
    if isinstance(name, str):
        changes["general.name"] = name.removesuffix("-abliterated")
    tags = [tag for tag in known.get("general.tags") or [] if tag not in TAGS]
    changes["general.tags"] = tags or None
    count = int(known.get("general.base_model.count", 0))
    if count:
        changes["general.base_model.count"] = count - 1 or None
        prefix = f"general.base_model.{count - 1}."
        changes |= {key: None for key in known if key.startswith(prefix)}
    return changes
