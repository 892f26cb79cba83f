"""The weights in a folder, with a quantized matrix as one weight whatever tensors hold it.

MLX stores a matrix as codes, scales and biases; gpt-oss's publisher as blocks and scales of MXFP4.
Some of these are blocks of a GGUF type as they are, so that they move without loss:

- affine codes of 2, 3 or 4 bits are Q4_1, those of 5 bits Q5_1, where every scale and bias is exact
  in float16; a block of 32 takes the scale of the group that it lies in;
- affine codes of 4, 5 or 8 bits are Q4_0, Q5_0 or Q8_0 where every bias is -8, -16 or -128 times
  its scale, as after such a GGUF;
- mxfp4 is MXFP4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType

from convert.base.errors import UserError
from convert.mlx import types
from convert.mlx.matrix import Matrix, find_matrix
from convert.mlx.safetensors_files import TensorFiles

_Q = GGMLQuantizationType

FLOATS = ("F32", "F16", "BF16", "F64")

_BLOCK = 32

_CENTRED = {4: _Q.Q4_0, 5: _Q.Q5_0, 8: _Q.Q8_0}
_WITH_OFFSETS = {2: _Q.Q4_1, 3: _Q.Q4_1, 4: _Q.Q4_1, 5: _Q.Q5_1}
"""Bits of affine codes -> the GGML type that holds them, without and with an offset."""


class FolderWeights:
    """The weights of a folder, by the name of the tensor that holds their values or codes."""

    def __init__(self, files: TensorFiles, config: Mapping[str, Any]) -> None:
        """
        Args:
            files: the folder's tensors.
            config: its config.json.
        """
        self.files = files
        self._matrices: dict[str, Matrix] = {}
        parts: set[str] = set()
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name in files.names:
            if name.endswith(".weight") and f"{name.removesuffix('weight')}scales" in files:
                matrix = find_matrix(files, name, self._row(name, config))
                assert matrix is not None
                self._matrices[name] = matrix
                parts |= set(matrix.names.values())
        for name in files.names:
            shape = files.info(name).shape
            if name in self._matrices:
                shape = self._matrices[name].shape
            elif name in parts or self.is_scale(name):
                continue
            elif self.is_blocks(name):
                *lead, blocks, _ = shape
                shape = (*lead, blocks * _BLOCK)
            self.shapes[name] = shape

    def _row(self, name: str, config: Mapping[str, Any]) -> int:
        """The number of weights in a row, from the bits that config.json gives."""
        module = name.removesuffix(".weight")
        settings = config.get("quantization") or config.get("quantization_config") or {}
        own = settings.get(module)
        bits = own.get("bits") if isinstance(own, dict) else settings.get("bits")
        if not isinstance(bits, int):
            raise UserError(
                f"{name} is quantized, but config.json does not say to how many bits: download "
                "config.json again."
            )
        return self.files.info(name).shape[-1] * 32 // bits

    def is_blocks(self, name: str) -> bool:
        """Whether a tensor holds blocks of MXFP4 as gpt-oss's publisher stores them."""
        return name.endswith("_blocks") and f"{name.removesuffix('blocks')}scales" in self.files

    def is_scale(self, name: str) -> bool:
        """Whether a tensor holds the scales of such blocks."""
        return name.endswith("_scales") and f"{name.removesuffix('scales')}blocks" in self.files

    def is_quantized(self, name: str) -> bool:
        """Whether a weight is quantized."""
        return name in self._matrices or self.is_blocks(name)

    def form(self, name: str) -> str:
        """How a weight is stored: "F16", or "4-bit, groups of 64"."""
        if self.is_blocks(name):
            return "mxfp4"
        if name in self._matrices:
            return str(self._matrices[name].quantization)
        return self.files.info(name).dtype

    def values(self, name: str) -> mx.array:
        """A weight's values, float32."""
        if self.is_blocks(name):
            return mx.array(_mxfp4_values(self._mxfp4(name)).reshape(self.shapes[name]))
        if name in self._matrices:
            matrix = self._matrices[name]
            values = mx.array(matrix.values(self.files))
            matrix.release(self.files)
            return values
        return self.files.read(name).astype(mx.float32)

    def block_type(self, name: str) -> GGMLQuantizationType | None:
        """The GGML type whose blocks hold the same weights; None where there is none."""
        if self.is_blocks(name):
            return _Q.MXFP4
        matrix = self._matrices.get(name)
        if matrix is None or matrix.shape[-1] % _BLOCK:
            return None
        kind = matrix.quantization
        if kind.mode == "mxfp4":
            return _Q.MXFP4
        if kind.mode != "affine":
            return None
        scales, biases = self._scales(matrix)
        if not _is_float16(scales):
            return None
        half = np.float32(-(2 ** (kind.bits - 1)))
        if kind.bits in _CENTRED and np.array_equal(biases, scales * half):
            return _CENTRED[kind.bits]
        return _WITH_OFFSETS.get(kind.bits) if _is_float16(biases) else None

    def blocks(self, name: str, to: GGMLQuantizationType) -> np.ndarray:
        """The weight as blocks of its `block_type` or a type that holds it: uint8 (rows, bytes)."""
        if to == _Q.MXFP4:
            blocks = self._mxfp4(name)
            return blocks.reshape(len(blocks), -1)
        matrix = self._matrices[name]
        rows, n = matrix.rows, matrix.shape[-1]
        scales, biases = (
            np.repeat(part, matrix.quantization.group_size // _BLOCK, axis=-1)
            for part in self._scales(matrix)
        )
        codes = types.unpack(self._part(matrix, "weight").view("<u4"), matrix.quantization.bits)
        codes = codes.reshape(rows, n // _BLOCK, _BLOCK)
        halves: list[np.ndarray] = [scales.astype("<f2")[..., None].view(np.uint8)]
        if to == _Q.Q8_0:
            return np.concatenate([*halves, codes ^ 0x80], axis=-1).reshape(rows, -1)
        if to in _WITH_OFFSETS.values():
            halves.append(biases.astype("<f2")[..., None].view(np.uint8))
        low, high = codes[..., : _BLOCK // 2], codes[..., _BLOCK // 2 :]
        if to in (_Q.Q5_0, _Q.Q5_1):
            halves.append(np.packbits(codes >> 4, axis=-1, bitorder="little"))
        halves.append((low & 15) | (high & 15) << 4)
        return np.concatenate(halves, axis=-1).reshape(rows, -1)

    def _part(self, matrix: Matrix, part: str) -> np.ndarray:
        raw = np.frombuffer(self.files.bytes(matrix.names[part]), np.uint8)
        return raw.reshape(matrix.rows, -1)

    def _scales(self, matrix: Matrix) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for part in ("scales", "biases"):
            array = self.files.read(matrix.names[part])
            found.append(np.array(array.astype(mx.float32)).reshape(matrix.rows, -1))
        return found[0], found[1]

    def _mxfp4(self, name: str) -> np.ndarray:
        """Blocks of MXFP4 as in a GGUF: uint8 (rows, blocks, 17)."""
        if name in self._matrices:
            matrix = self._matrices[name]
            codes = types.unpack(self._part(matrix, "weight").view("<u4"), 4)
            scales = self._part(matrix, "scales")
        else:
            stored = np.frombuffer(self.files.bytes(name), np.uint8)
            # Two neighbours in a byte, the first in its low half.
            codes = np.stack((stored & 15, stored >> 4), axis=-1)
            names = self.files.bytes(f"{name.removesuffix('blocks')}scales")
            count = math.prod(self.shapes[name][:-1])
            scales = np.frombuffer(names, np.uint8).reshape(count, -1)
        codes = codes.reshape(*scales.shape, _BLOCK)
        low, high = codes[..., : _BLOCK // 2], codes[..., _BLOCK // 2 :]
        return np.concatenate([scales[..., None], low | high << 4], axis=-1)


def _is_float16(values: np.ndarray) -> bool:
    with np.errstate(all="ignore"):
        return bool(np.array_equal(values.astype(np.float16).astype(np.float32), values))


def _mxfp4_values(blocks: np.ndarray) -> np.ndarray:
    from gguf.quants import dequantize  # lazily: gguf.quants is slow to import

    return np.asarray(dequantize(blocks.reshape(len(blocks), -1), _Q.MXFP4), dtype=np.float32)
