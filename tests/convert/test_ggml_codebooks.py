"""Bytes <-> CodebookGrid for IQ1, IQ2 and IQ3, against gguf-py and ggml itself."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from convert.base.codebooks import EVEN, NONE, CodebookGrid
from convert.base.errors import UserError
from convert.gguf import ggml, ggml_types
from convert.gguf.ggml_codebooks import CODEBOOK_CODECS, CodebookCodec

# Relative error on Gaussian weights with an even importance matrix.
ORDINARY = {
    Q.IQ1_S: 0.486, Q.IQ1_M: 0.455, Q.IQ2_XXS: 0.342, Q.IQ2_XS: 0.299, Q.IQ2_S: 0.248,
    Q.IQ3_XXS: 0.182, Q.IQ3_S: 0.137,
}  # fmt: skip

every_type = pytest.mark.parametrize("codec", CODEBOOK_CODECS, ids=lambda codec: codec.type.name)


def quantized(codec: CodebookCodec, rows: int = 8) -> np.ndarray:
    values = np.random.default_rng(0).standard_normal((rows, 1024)).astype(np.float32)
    return ggml.quantize(values, codec.type, np.ones(1024, np.float32))


def random_bytes(codec: CodebookCodec) -> np.ndarray:
    """Blocks of random bytes, but for the bit of d's exponent that would make it infinite."""
    raw = np.random.default_rng(1).integers(0, 256, (40, codec.size), dtype=np.uint8)
    raw[:, 55 if codec.type == Q.IQ1_M else 1] &= 0xBF
    return raw.reshape(10, 4 * codec.size)


def assert_same_bits(values: np.ndarray, wanted: np.ndarray) -> None:
    assert values.dtype == wanted.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint32), wanted.view(np.uint32))


@every_type
@pytest.mark.parametrize("make", [quantized, random_bytes])
def test_bytes_decode_to_the_bit_and_encode_to_the_same_bytes(codec, make) -> None:
    raw = make(codec)
    grid = codec.decode(raw, 1024)
    assert grid.shape == (len(raw), 1024)
    assert_same_bits(grid.values(), gguf.quants.dequantize(raw, codec.type))
    np.testing.assert_array_equal(grid.values(), ggml.dequantize(raw, codec.type))
    np.testing.assert_array_equal(codec.encode(grid), raw)


@every_type
def test_any_entries_and_signs_are_written_and_nothing_else_changes(codec: CodebookCodec) -> None:
    raw = random_bytes(codec)
    grid = codec.decode(raw, 1024)
    random = np.random.default_rng(2)
    codes = random.integers(0, len(grid.book.entries), grid.codes.shape).astype(np.uint16)
    signs = random.integers(0, 1 << codec.group, grid.signs.shape).astype(np.uint8)
    if codec.signs == NONE:
        signs[...] = 0
    elif codec.signs == EVEN:
        # An even number of other signs leaves an even number of minus signs.
        signs = grid.signs ^ signs ^ np.bitwise_xor.reduce(np.unpackbits(signs[..., None], -1), -1)
    other = grid.with_codes(codes, signs)
    changed = codec.encode(other)
    again = codec.decode(changed, 1024)
    np.testing.assert_array_equal(again.codes, codes)
    np.testing.assert_array_equal(again.signs, signs)
    np.testing.assert_array_equal(again.scales, grid.scales)
    assert_same_bits(other.values(), gguf.quants.dequantize(changed, codec.type))
    assert grid.changed(other) > 0.9 * grid.values().size
    np.testing.assert_array_equal(codec.encode(again.with_codes(grid.codes, grid.signs)), raw)


@every_type
def test_types_and_their_codecs(codec: CodebookCodec) -> None:
    assert ggml_types.codec(codec.type) is ggml_types.quantized_codec(codec.type) is codec
    assert ggml_types.has_grid(codec.type)
    assert (codec.block, codec.size) == gguf.GGML_QUANT_SIZES[codec.type]
    assert codec.bits == pytest.approx(8 * codec.size / codec.block)
    with pytest.raises(UserError, match="no code for each weight"):
        ggml_types.grid_codec(codec.type)


@every_type
def test_a_fresh_grid_is_ggmls_own(codec: CodebookCodec) -> None:
    values = np.random.default_rng(0).standard_normal((8, 1024)).astype(np.float32)
    grid = ggml_types.fresh(values, codec.type)
    error = float(np.linalg.norm(grid.values() - values) / np.linalg.norm(values))
    assert error == pytest.approx(ORDINARY[codec.type], rel=0.02)
    assert ggml_types.refit(grid, 2 * values, codec.type) is grid
    importance = np.exp(np.random.default_rng(1).standard_normal(1024)).astype(np.float32)
    weighted = ggml_types.fresh(values, codec.type, importance)
    assert isinstance(weighted, CodebookGrid)
    errors = [
        float(((one.values() - values) ** 2 * importance).sum()) for one in (grid, weighted)
    ]  # fmt: skip
    assert errors[1] < errors[0]


@every_type
def test_a_scale_that_is_no_number_is_refused(codec: CodebookCodec) -> None:
    raw = quantized(codec)
    if codec.type == Q.IQ1_M:
        raw[2, 48:56] |= 0xF0
    else:
        raw[2, 1] = 0x7C
    with pytest.raises(UserError, match=f"block 0 of row 2 has a {codec.type.name} scale"):
        codec.decode(raw, 1024)
    with pytest.raises(UserError, match="do not fit"):
        codec.decode(quantized(codec), 1000)
