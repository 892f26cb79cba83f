"""The same weights, unedited, in the other format: a folder as a GGUF, and a GGUF as a folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abl_mlx.inputs.sources import Source
from abl_mlx.outputs.edit_label import gguf_label
from abl_mlx.outputs.provenance import TAGS
from abl_mlx.outputs.staging import FOLDER, GGUF
from abl_mlx.records.edits import Converted
from abl_mlx.support import notes
from abl_mlx.support.console import progress, progress_to
from convert import gguf_to_mlx, mlx_to_gguf
from convert.gguf.file import GgufSource


@dataclass(frozen=True)
class NewTypes:
    """The types that weights get in the other format.

    Attributes:
        quantize: the file type of a GGUF.
        bits, group_size, dtype: for an MLX folder, as for `convert.gguf_to_mlx.write_folder`.
    """

    quantize: str = "F16"
    bits: int | None = None
    group_size: int = 64
    dtype: str | None = None


def to_gguf(
    source: Source, label: Mapping[str, Any] | None, out: Path, types: NewTypes
) -> Converted:
    """Write a folder as a GGUF.

    Args:
        source: the folder.
        label: the label of an edited folder, which the GGUF keeps; None for others.
        out: the GGUF to write.
        types: the types of its weights.
    """
    metadata: dict[str, Any] = {"general.name": source.title}
    if label is not None:
        metadata["general.tags"] = TAGS
        metadata |= {f"abl_mlx.{key}": value for key, value in label.items()}
    with progress_to(f"write {out.name}", "tensor") as moved:
        report = mlx_to_gguf.write_gguf(
            source.path, out, file_type=types.quantize, metadata=metadata, progress=moved
        )
    return Converted(
        output=str(out),
        format=GGUF,
        tensors=dict(Counter(report.types.values())),
        bytes=report.bytes,
        note=notes.vision(report.left_out),
    )


def to_folder(gguf: GgufSource, out: Path, types: NewTypes) -> Converted:
    """Write a GGUF as an MLX folder."""
    size = sum(entry.nbytes for entry in gguf.tensors.values())
    label = gguf_label(gguf)
    with progress(size, f"write {out.name}", "B") as bar:
        report = gguf_to_mlx.write_folder(
            gguf,
            out,
            bits=types.bits,
            group_size=types.group_size,
            dtype=types.dtype,
            label=label,
            tags=TAGS[:1] if label else (),
            progress=bar.update,
        )
    return Converted(
        output=str(out),
        format=FOLDER,
        tensors=dict(report.forms),
        bytes=report.bytes,
        left_out=list(report.left_out) or None,
        note=notes.joined(notes.drafting(report.left_out), notes.window(report.config)),
    )
