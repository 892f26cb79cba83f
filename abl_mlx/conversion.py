"""`abl-mlx convert`: the same weights in the other format, unedited."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abl_mlx import __version__, notes, outputs
from abl_mlx.clock import Clock
from abl_mlx.model_file import find_model
from abl_mlx.models import progress
from abl_mlx.provenance import TAGS
from abl_mlx.sources import Source
from convert import gguf_to_mlx, mlx_to_gguf
from convert.errors import UserError
from convert.gguf_file import GgufSource
from convert.hf_config import read_config

Record = dict[str, Any]


def convert(
    text: str,
    out: Path,
    *,
    quantize: str = "F16",
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
) -> Record:
    """A GGUF as an MLX folder, or an MLX or Hugging Face folder as a GGUF.

    Args:
        text: what the user typed for the source.
        out: NAME.gguf, or a folder.
        quantize: type of a GGUF.
        bits, group_size, dtype: of an MLX folder, as `convert.gguf_to_mlx.write_folder` takes them.

    Raises:
        UserError: when the source has the output's format already, and as the two writers do.
    """
    clock = Clock()
    model = find_model(text)
    source = model.source
    outputs.check([out], source, model.adapter)
    to_gguf = outputs.is_file(out)
    if (outputs.GGUF if to_gguf else outputs.FOLDER) == model.format:
        other = "mlx_lm.convert" if not to_gguf else "llama.cpp's llama-quantize"
        raise UserError(
            f"{text} is {'a GGUF' if to_gguf else 'a folder'} already, and so would {out} be: to "
            f"change its type use {other}."
        )
    if to_gguf and (bits or dtype):
        raise UserError(
            "--bits and --dtype are for MLX folders: choose a GGUF's type by --quantize."
        )
    with clock.step("convert"):
        written = (
            _to_gguf(source, out, quantize) if to_gguf
            else _to_mlx(source, out, bits, group_size, dtype)
        )  # fmt: skip
    return {
        "abl_mlx": __version__, "source": source.name, "output": str(out), **written,
        "seconds": clock.seconds,
    }  # fmt: skip


def _to_gguf(source: Source, out: Path, quantize: str) -> Record:
    with progress(1, f"write {out.name}", "tensor") as bar:

        def moved(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        report = mlx_to_gguf.write_gguf(
            source.path,
            out,
            file_type=quantize,
            metadata={"general.name": source.title, **_edit_label(source)},
            progress=moved,
        )
    counts: dict[str, int] = {}
    for kind in report.types.values():
        counts[kind] = counts.get(kind, 0) + 1
    note = notes.vision(report.left_out)
    return {"format": "GGUF", "tensors": counts, "bytes": report.bytes, **notes.noted(note)}


def _edit_label(source: Source) -> dict[str, Any]:
    """A GGUF of an edited folder says of itself what the folder says."""
    label = read_config(source.path).get("abl_mlx")
    if not isinstance(label, dict):
        return {}
    keys = {f"abl_mlx.{key}": value for key, value in label.items()}
    return {"general.tags": TAGS, **keys}


def _to_mlx(
    source: Source, out: Path, bits: int | None, group_size: int, dtype: str | None
) -> Record:
    with GgufSource(source.path) as gguf:
        size = sum(entry.nbytes for entry in gguf.tensors.values())
        with progress(size, f"write {out.name}", "B") as bar:
            report = gguf_to_mlx.write_folder(
                gguf, out, bits=bits, group_size=group_size, dtype=dtype, progress=bar.update
            )
    return {
        "format": "MLX",
        "tensors": report.forms,
        "bytes": report.bytes,
        **({"left_out": list(report.left_out)} if report.left_out else {}),
        **notes.noted(notes.drafting(report.left_out)),
    }
