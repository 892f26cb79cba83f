"""`abl-mlx convert`: the same weights in another format or other types, unedited."""

from __future__ import annotations

from pathlib import Path

from abl_mlx import __version__
from abl_mlx.outputs import destinations, staging
from abl_mlx.outputs.model_file import find_model
from abl_mlx.outputs.new_parts import new_parts
from abl_mlx.outputs.other_format import NewTypes
from abl_mlx.records.edits import ConvertRecord
from abl_mlx.support.clock import Clock
from convert.base.errors import UserError


def convert(
    text: str,
    out: Path,
    *,
    quantize: str | None = None,
    keep_types: bool = False,
    imatrix: Path | None = None,
    split_max_size: int | None = None,
    join: bool = False,
    bits: int | None = None,
    group_size: int = 64,
    dtype: str | None = None,
) -> ConvertRecord:
    """Write a GGUF as an MLX folder or with other types, or a folder as a GGUF.

    Args:
        text: the source as the user typed it.
        out: NAME.gguf, or a folder.
        quantize: the file type of a GGUF; None for F16 from a folder, where quantized weights are
            kept if a GGUF has a type for them.
        keep_types: for a GGUF: let quantized tensors keep their type.
        imatrix: for a GGUF, the file of an importance matrix.
        split_max_size: the largest size of a GGUF file in bytes.
        join: write one GGUF even if the source is in parts.
        bits, group_size, dtype: for an MLX folder, as for `convert.gguf_to_mlx.write_folder`.

    Raises:
        UserError: when the source already has the output's format, or it cannot be converted.
    """
    clock = Clock()
    with find_model(text) as model:
        staging.check([out], model.source, model.adapter)
        parts = new_parts(split_max_size, join=join)
        types = NewTypes(quantize, keep_types, imatrix, parts, bits, group_size, dtype)
        _check(text, model.format, out, types)
        destinations.check_further([out], model)
        with clock.step("convert"):
            written = model.convert(out, types)
    return ConvertRecord(
        **written.values_by_field,
        abl_mlx=__version__,
        source=model.source.name,
        seconds=clock.seconds,
    )


def _check(text: str, source: str, out: Path, types: NewTypes) -> None:
    to_gguf, from_gguf = staging.is_file(out), source == staging.GGUF
    if not to_gguf and not from_gguf:
        raise UserError(
            f"{text} is a folder already, and so would {out} be: to change its type use "
            "mlx_lm.convert."
        )
    if to_gguf and from_gguf and not types.quantize and types.parts is None:
        raise UserError(
            f"{text} is a GGUF already, and so would {out} be: say its new type by --quantize, or "
            "its new parts by --split-max-size or --join."
        )
    if types.parts is not None and not to_gguf:
        raise UserError("--split-max-size and --join are for GGUFs: choose NAME.gguf as output.")
    if to_gguf and (types.bits or types.dtype):
        raise UserError(
            "--bits and --dtype are for MLX folders: choose a GGUF's type by --quantize."
        )
    if types.imatrix and not to_gguf:
        raise UserError("--imatrix is for GGUFs: choose NAME.gguf as the output.")
    if types.imatrix and not types.quantize:
        raise UserError("--imatrix weights the errors of quantizing: say the type by --quantize.")
    if types.keep_types and not to_gguf:
        raise UserError("--keep-types is for GGUFs: choose NAME.gguf as the output.")
    if types.keep_types and not from_gguf and not types.quantize:
        raise UserError(
            "--keep-types: quantized matrices keep their weights, unless --quantize is given."
        )
