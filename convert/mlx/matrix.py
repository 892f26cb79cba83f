"""A quantized matrix in a folder of an MLX model, read as Grids."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from convert.base.errors import UserError
from convert.base.grids import Grid
from convert.mlx.grids import MlxCodec, Quantization, Rows
from convert.mlx.safetensors_files import TensorFiles

PARTS = ("weight", "scales", "biases", "global_scale")


@dataclass(frozen=True)
class Matrix:
    """The quantized weight of a module, in the tensors of a folder.

    Attributes:
        names: part (one of `PARTS`) -> tensor name, for each part that the module has.
        shape: the shape of the unpacked weight: (out, in), (E, out, in) or (V, d).
        quantization: its mode, bits and group size.
        dtype: the type of scales and biases: F32, F16 or BF16; U8 for all modes but affine.
    """

    names: dict[str, str]
    shape: tuple[int, ...]
    quantization: Quantization
    dtype: str

    @property
    def name(self) -> str:
        """Name of the tensor that holds the codes."""
        return self.names["weight"]

    @cached_property
    def codec(self) -> MlxCodec:
        """The codec that turns its stored rows into a Grid and back."""
        return MlxCodec(self.quantization, self.dtype)

    @property
    def rows(self) -> int:
        """R, the number of rows, those of all experts together."""
        return math.prod(self.shape[:-1])

    def tensors(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Tensor name -> safetensors type and shape of all parts but the global scale."""
        head, n = self.shape[:-1], self.shape[-1]
        groups = n // self.quantization.group_size
        made = {self.name: ("U32", (*head, n * self.quantization.bits // 32))}
        for part in ("scales", "biases"):
            if part in self.names:
                made[self.names[part]] = (self.dtype, (*head, groups))
        return made

    def read(self, files: TensorFiles, rows: slice, columns: slice) -> Grid:
        """The Grid of some rows and columns; the columns must be whole groups.

        Raises:
            UserError: naming the tensor, when it holds a number that is not finite.
        """
        n = self.shape[-1]
        raw: dict[str, np.ndarray] = {}
        for part, size in self.codec.row_bytes(n).items():
            whole = np.frombuffer(files.bytes(self.names[part]), np.uint8).reshape(-1, size)
            at = slice(columns.start * size // n, columns.stop * size // n)
            raw[part] = whole[rows, at]
        if "global_scale" in self.names:
            each = files.bytes(self.names["global_scale"])
            per_expert = np.frombuffer(each, "<f4").astype(np.float32)
            expert = np.arange(rows.start, rows.stop) // self.shape[-2]
            raw["global_scale"] = per_expert[expert]
        try:
            return self.codec.decode(Rows(**raw))
        except UserError as error:
            raise UserError(f"{self.name} in {files.info(self.name).file}: {error}") from None

    def values(self, files: TensorFiles) -> np.ndarray:
        """All weights, float32, in the matrix's shape."""
        grid = self.read(files, slice(0, self.rows), slice(0, self.shape[-1]))
        return grid.values().reshape(self.shape)

    def release(self, files: TensorFiles) -> None:
        """Let the system drop from memory the pages of the file that were read."""
        for name in self.names.values():
            files.release(name)


def find_matrix(files: TensorFiles, weight: str, n: int) -> Matrix | None:
    """The matrix whose codes are the tensor ``weight``; None if that is not a quantized matrix.

    Bits, group size and mode are inferred from shapes and types, as mlx-lm's loader does.

    Args:
        files: the folder's tensors.
        weight: a tensor's name; those of its scales and biases follow from it.
        n: weights per row.

    Raises:
        UserError: when weight, scales and biases do not fit together.
    """
    stem = weight.removesuffix("weight")
    if f"{stem}scales" not in files:
        return None
    names = {part: f"{stem}{part}" for part in PARTS if f"{stem}{part}" in files}
    codes, scales = files.info(weight), files.info(names["scales"])
    where = f"{weight} in {codes.file}"
    if codes.dtype != "U32" or len(codes.shape) < 2 or not codes.shape[-1] or not scales.shape[-1]:
        raise UserError(f"{where} has scales but is no quantized matrix: get the file again.")
    bits, rest = divmod(codes.shape[-1] * 32, n)
    group, other = divmod(n, scales.shape[-1])
    mode = "affine"
    if scales.dtype == "U8":
        mode = {(4, 16): "nvfp4", (4, 32): "mxfp4", (8, 32): "mxfp8"}.get((bits, group), "?")
    found = Matrix(names, (*codes.shape[:-1], n), Quantization(bits, group, mode), scales.dtype)
    wanted = {name: shape for name, (_, shape) in found.tensors().items()}
    fits = not (rest or other) and ("biases" in names) == (mode == "affine")
    fits &= all(files.info(name).shape == shape for name, shape in wanted.items())
    fits &= "biases" not in names or files.info(names["biases"]).dtype == scales.dtype
    if "global_scale" in names:
        whole = files.info(names["global_scale"])
        fits &= mode == "nvfp4" and whole.dtype == "F32"
        fits &= math.prod(whole.shape) == math.prod(found.shape[:-2])
    try:
        _ = found.codec
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    if not fits:
        raise UserError(
            f"{where} and its scales and biases do not fit together for rows of {n} weights: "
            "convert the model again with `mlx_lm.convert`."
        )
    return found
