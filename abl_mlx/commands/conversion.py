"""`abl-mlx convert`: the same weights in the other format, unedited."""

from __future__ import annotations

from pathlib import Path

from abl_mlx import __version__
from abl_mlx.outputs import staging
from abl_mlx.outputs.model_file import find_model
from abl_mlx.outputs.other_format import NewTypes
from abl_mlx.records.edits import ConvertRecord
from abl_mlx.support.clock import Clock
from convert.base.errors import UserError


def convert(
    text: str,
    out: Path,
    *,
    quantize: str = "F16",
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
) -> ConvertRecord:
    """Write a GGUF as an MLX folder, or an MLX or Hugging Face folder as a GGUF.

    Args:
        text: the source as the user typed it.
        out: NAME.gguf, or a folder.
        quantize: the file type of a GGUF.
        bits, group_size, dtype: for an MLX folder, as for `convert.gguf_to_mlx.write_folder`.

    Raises:
        UserError: when the source already has the output's format, or it cannot be converted.
    """
    clock = Clock()
    with find_model(text) as model:
        staging.check([out], model.source, model.adapter)
        to_gguf = staging.is_file(out)
        if (staging.GGUF if to_gguf else staging.FOLDER) == model.format:
            other = "mlx_lm.convert" if not to_gguf else "llama.cpp's llama-quantize"
            raise UserError(
                f"{text} is {'a GGUF' if to_gguf else 'a folder'} already, and so would {out} be: "
                f"to change its type use {other}."
            )
        if to_gguf and (bits or dtype):
            raise UserError(
                "--bits and --dtype are for MLX folders: choose a GGUF's type by --quantize."
            )
        with clock.step("convert"):
            written = model.convert(out, NewTypes(quantize, bits, group_size, dtype))
    return ConvertRecord(
        **written.values_by_field,
        abl_mlx=__version__,
        source=model.source.name,
        seconds=clock.seconds,
    )
