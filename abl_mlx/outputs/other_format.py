"""The same weights, unedited, in another format or other types: folders and GGUFs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abl_mlx.inputs.sources import Source
from abl_mlx.outputs import further_files, new_parts
from abl_mlx.outputs.edit_label import gguf_label
from abl_mlx.outputs.provenance import TAGS, tagged
from abl_mlx.outputs.staging import FOLDER, GGUF
from abl_mlx.records.edits import Converted
from abl_mlx.support import notes
from abl_mlx.support.console import progress, progress_to
from convert import gguf_to_mlx, mlx_to_gguf
from convert.architectures.model_card import card_keys
from convert.base.atomic import new_files
from convert.gguf import imatrix
from convert.gguf.file import GgufSource
from convert.gguf.file_types import FLOATS
from convert.gguf.quantize import Quantization
from convert.gguf.regroup import NewParts
from convert.gguf.rewrite import rewrite, split


@dataclass(frozen=True)
class NewTypes:
    """The types that weights get in a converted model.

    Attributes:
        quantize: the file type of a GGUF; None as for `convert.mlx_to_gguf.write_gguf` from a
            folder, and for every tensor's own type from a GGUF.
        keep_types: with ``quantize``: let quantized tensors keep their type or, from a folder,
            their weights where a GGUF has a type for them.
        imatrix: the file of an importance matrix, which weights errors in quantizing.
        parts: into how many files a GGUF is written; None for the source's parts.
        bits, group_size, dtype: for an MLX folder, as for `convert.gguf_to_mlx.write_folder`.
    """

    quantize: str | None = None
    keep_types: bool = False
    imatrix: Path | None = None
    parts: NewParts | None = None
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
        metadata["general.tags"] = tagged(card_keys(source.path))
        metadata |= {f"abl_mlx.{key}": value for key, value in label.items()}
    new_parts.check(out, types.parts, 1)
    with new_files(out) as folder, progress_to(f"write {out.name}", "tensor") as moved:
        staged = folder / out.name
        report = mlx_to_gguf.write_gguf(
            source.path,
            staged,
            file_type=types.quantize,
            keep_types=types.keep_types,
            metadata=metadata,
            imatrix=imatrix.given(types.imatrix),
            progress=moved,
        )
        tower = further_files.write_tower(source.path, staged)
        files = split(staged, types.parts)
    return Converted(
        output=str(out.with_name(files[0].name)),
        format=GGUF,
        tensors=dict(Counter(report.types.values())),
        bytes=report.bytes,
        note=notes.joined(tower, notes.repacked(report.forms)),
    )


def to_other_types(gguf: GgufSource, out: Path, types: NewTypes) -> Converted:
    """Write a GGUF as a GGUF of another file type."""
    weights = imatrix.given(types.imatrix)
    chosen = Quantization.of(gguf, types.quantize, weights, keep=types.keep_types)
    new_parts.check(out, types.parts, len(gguf.parts))
    tensors = chosen.replacements(gguf)
    again = sum(gguf.tensors[name].type not in FLOATS for name in tensors)
    with progress_to(f"write {out.name}", "B") as moved:
        files = rewrite(
            gguf,
            out,
            tensors=tensors,
            metadata=chosen.metadata(),
            parts=types.parts,
            progress=moved,
        )
    return Converted(
        output=str(files[0]),
        format=GGUF,
        tensors=dict(Counter(kind.name for kind in chosen.types.values())),
        bytes=sum(file.stat().st_size for file in files),
        note=notes.quantized_again(again),
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
