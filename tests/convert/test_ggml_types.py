"""Bytes <-> Grid for every GGML type, against gguf-py and ggml itself."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from convert.base.errors import UserError
from convert.base.grids import Grid
from convert.gguf import ggml, ggml_types

every_type = pytest.mark.parametrize("kind", ggml_types.GRID_TYPES, ids=lambda kind: kind.name)

# Where in a block the float16 numbers are.
HALVES = {
    **{Q.Q4_0: (0,), Q.Q4_1: (0, 2), Q.Q5_0: (0,), Q.Q5_1: (0, 2), Q.Q8_0: (0,)},
    **{Q.Q2_K: (80, 82), Q.Q3_K: (108,), Q.Q4_K: (0, 2), Q.Q5_K: (0, 2), Q.Q6_K: (208,)},
    **{Q.IQ4_NL: (0,), Q.IQ4_XS: (0,), Q.MXFP4: (), Q.NVFP4: ()},
    **{Q.TQ1_0: (52,), Q.TQ2_0: (64,)},
}
TERNARY = (Q.TQ1_0, Q.TQ2_0)


@pytest.fixture(scope="module")
def normal() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((96, 2048)).astype(np.float32)


@pytest.fixture
def no_ggml(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ggml._find.cache_clear()
    monkeypatch.setattr(ggml, "_candidates", lambda: iter(()))
    yield
    monkeypatch.undo()
    ggml._find.cache_clear()


def random_bytes(kind: Q, rows: int, blocks: int, seed: int) -> np.ndarray:
    """Rows of blocks with all bits random, but for the exponents that make no finite number."""
    random = np.random.default_rng(seed)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    raw = random.integers(0, 256, (rows * blocks, size), dtype=np.uint8)
    for at in HALVES[kind]:
        bits = random.integers(0, 1 << 16, rows * blocks, dtype=np.uint16)
        # An exponent of all ones becomes the one below.
        bits = np.where(bits & 0x7C00 == 0x7C00, bits & np.uint16(0xFBFF), bits)
        raw[:, at : at + 2] = bits.astype("<u2")[:, None].view(np.uint8)
    if kind == Q.MXFP4:
        # 12 * 2 ** 125 and more is beyond float32.
        raw[:, 0] = random.integers(0, 253, rows * blocks)
    if kind == Q.TQ2_0:
        # The code 3 is no ternary weight.
        raw[:, :64] &= ~((raw[:, :64] & (raw[:, :64] >> 1) & 0x55) << 1)
    return raw.reshape(rows, blocks * size)


def width(kind: Q, raw: np.ndarray) -> int:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    return int(raw.shape[1] // size * block)


def decode(kind: Q, raw: np.ndarray) -> Grid:
    return ggml_types.grid_codec(kind).decode(raw, width(kind, raw))


def encode(kind: Q, grid: Grid) -> np.ndarray:
    return ggml_types.grid_codec(kind).encode(grid)


def error(values: np.ndarray, wanted: np.ndarray) -> float:
    return float(np.linalg.norm(values - wanted) / np.linalg.norm(wanted))


def assert_same_bits(values: np.ndarray, wanted: np.ndarray) -> None:
    assert values.dtype == wanted.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint32), wanted.view(np.uint32))


def assert_like_both_decoders(kind: Q, raw: np.ndarray, grid: Grid) -> None:
    values = grid.values()
    assert_same_bits(values, gguf.quants.dequantize(raw, kind))
    real = ggml.dequantize(raw, kind)
    if platform.machine() == "x86_64" or grid.offsets is None:
        assert_same_bits(values, real)
    else:
        # Elsewhere the compiler may fuse ggml's multiplication and subtraction into one rounding.
        largest = np.maximum(*(np.abs(end) for end in grid.ends())) + np.abs(grid.offsets)
        slack = np.repeat(largest, grid.group, axis=1) * np.float32(2**-22)
        assert (np.abs(values - real) <= slack).all()


@every_type
def test_a_quantized_tensor_decodes_to_the_bit_and_encodes_to_the_same_bytes(
    normal: np.ndarray, kind: Q
) -> None:
    raw = ggml.quantize(normal, kind)
    grid = decode(kind, raw)
    assert grid.shape == normal.shape
    assert len(np.unique(grid.codes)) > min(len(grid.levels), 200) - 2
    assert_like_both_decoders(kind, raw, grid)
    np.testing.assert_array_equal(encode(kind, grid), raw)


@every_type
def test_random_bytes_decode_to_the_bit_and_encode_to_the_same_bytes(kind: Q) -> None:
    raw = random_bytes(kind, 61, 33, seed=1)
    grid = decode(kind, raw)
    assert_like_both_decoders(kind, raw, grid)
    np.testing.assert_array_equal(encode(kind, grid), raw)
    if HALVES[kind]:
        assert (grid.scales < 0).any()


@every_type
def test_other_codes_change_the_code_bits_and_nothing_else(kind: Q) -> None:
    raw = random_bytes(kind, 5, 7, seed=2)
    grid = decode(kind, raw)
    random = np.random.default_rng(3)
    codes = random.integers(0, len(grid.levels), grid.shape).astype(np.uint8)
    changed = encode(kind, grid.with_codes(codes))
    again = decode(kind, changed)
    np.testing.assert_array_equal(again.codes, codes)
    assert_same_bits(again.scales, grid.scales)
    if grid.offsets is not None and again.offsets is not None:
        assert_same_bits(again.offsets, grid.offsets)
    assert_same_bits(grid.with_codes(codes).values(), gguf.quants.dequantize(changed, kind))
    # Back to the old codes: every other bit was kept, so all bytes are the old ones. Only a zero
    # of E2M1 loses its sign on the way, and TQ1_0 has several bytes for the same five codes.
    back = encode(kind, again.with_codes(grid.codes))
    if kind in (Q.MXFP4, Q.NVFP4, Q.TQ1_0):
        np.testing.assert_array_equal(decode(kind, back).codes, grid.codes)
    else:
        np.testing.assert_array_equal(back, raw)
    np.testing.assert_array_equal(encode(kind, grid), raw)


@every_type
def test_a_single_code_changes_a_single_weight(normal: np.ndarray, kind: Q) -> None:
    grid = decode(kind, ggml.quantize(normal[:2, :512], kind))
    before = grid.values()
    for column in (0, 15, 16, 31, 300, 511):
        codes = grid.codes.copy()
        code = int(codes[1, column])
        codes[1, column] = code - 1 if code else 1
        after = decode(kind, encode(kind, grid.with_codes(codes))).values()
        assert np.argwhere(after != before).tolist() == [[1, column]]


@every_type
def test_rows_may_be_decoded_and_encoded_by_the_slice(kind: Q) -> None:
    raw = random_bytes(kind, 10, 4, seed=5)
    whole = decode(kind, raw)
    some = decode(kind, raw[3:8])
    assert_same_bits(some.values(), whole.values()[3:8])
    np.testing.assert_array_equal(encode(kind, some), raw[3:8])
    assert encode(kind, decode(kind, raw[:0])).shape == raw[:0].shape


def test_many_rows_go_over_threads_and_stay_in_place(normal: np.ndarray) -> None:
    raw = np.tile(ggml.quantize(normal, Q.Q4_K), (12, 1))
    assert raw.shape[0] * normal.shape[1] > 4 * 2**18
    raw[::7] = raw[0]
    raw.flags.writeable = False
    grid = decode(Q.Q4_K, raw)
    assert_same_bits(grid.values(), gguf.quants.dequantize(raw, Q.Q4_K))
    np.testing.assert_array_equal(encode(Q.Q4_K, grid), raw)


@every_type
def test_levels_ascend_and_the_block_is_ggmls(kind: Q) -> None:
    codec = ggml_types.grid_codec(kind)
    assert codec.is_grid
    assert (np.diff(codec.levels) > 0).all()
    assert codec.levels.dtype == np.float32
    assert (codec.block, codec.size) == gguf.GGML_QUANT_SIZES[kind]
    assert codec.bits == pytest.approx(8 * codec.size / codec.block)
    assert ggml_types.has_grid(kind)


@pytest.mark.parametrize("kind", [Q.MXFP4, Q.NVFP4])
def test_a_minus_zero_stays_one_until_its_code_changes(kind: Q) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.full((1, size), 0x38, dtype=np.uint8)
    at = size - block // 2
    raw[0, at] = 0x08
    grid = decode(kind, raw)
    zero = int(np.flatnonzero(grid.levels == 0)[0])
    assert grid.codes[0, 0] == zero
    assert encode(kind, grid)[0, at] == 0x08
    codes = grid.codes.copy()
    codes[0, 0] += 1
    assert encode(kind, grid.with_codes(codes))[0, at] == 0x01
    codes[0, 0] -= 2
    assert encode(kind, grid.with_codes(codes))[0, at] == 0x09


@every_type
def test_through_a_gguf_file(tmp_path: Path, normal: np.ndarray, kind: Q) -> None:
    first, second = normal[:6, :512].reshape(2, 3, 512), tmp_path / "second.gguf"
    write_gguf(tmp_path / "first.gguf", ggml.quantize(first, kind), kind)
    tensor = gguf.GGUFReader(tmp_path / "first.gguf").tensors[0]
    raw = ggml_types.as_rows(tensor.data)
    assert raw.shape[0] == 6
    grid = decode(kind, raw)
    changed = grid.with_codes(np.where(grid.codes > 0, grid.codes - 1, 1).astype(np.uint8))
    write_gguf(second, encode(kind, changed).reshape(tensor.data.shape), kind)
    read = gguf.GGUFReader(second).tensors[0]
    assert read.tensor_type == kind
    values = gguf.quants.dequantize(read.data, kind).reshape(6, 512)
    assert_same_bits(values, changed.values())
    # Every level was one step lower, so every value moved as its scale says.
    assert (values != grid.values()).mean() > 0.99


def write_gguf(path: Path, data: np.ndarray, kind: Q) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("blk.0.ffn_down_exps.weight", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        *[(Q.Q8_0, 0.00537), (Q.Q6_K, 0.0178), (Q.Q5_K, 0.0362), (Q.Q4_K, 0.0715)],
        *[(Q.Q4_0, 0.0862), (Q.Q3_K, 0.151), (Q.Q2_K, 0.297), (Q.Q4_1, 0.0783)],
        *[(Q.Q5_0, 0.0429), (Q.Q5_1, 0.0379), (Q.IQ4_NL, 0.0762), (Q.IQ4_XS, 0.0768)],
        *[(Q.MXFP4, 0.115), (Q.NVFP4, 0.0951)],
    ],
)
def test_a_fresh_grid_is_as_fine_as_the_type_allows(
    normal: np.ndarray, kind: Q, expected: float
) -> None:
    grid = ggml_types.fresh(normal, kind)
    assert error(grid.values(), normal) == pytest.approx(expected, rel=0.02)


@every_type
def test_nearest_is_never_worse_than_any_other_code(normal: np.ndarray, kind: Q) -> None:
    grid = ggml_types.fresh(normal[:4, :512], kind)
    wanted = grid.values() + 0.05 * normal[4:8, :512]
    found = grid.with_codes(grid.nearest(wanted)).values()
    every = [
        np.abs(grid.with_codes(np.full(grid.shape, code, np.uint8)).values() - wanted)
        for code in range(len(grid.levels))
    ]
    slack = 1e-6 * np.abs(wanted).max()
    assert (np.abs(found - wanted) <= np.min(every, axis=0) + slack).all()


def test_nearest_copes_with_negative_and_zero_scales() -> None:
    grid = Grid(
        codes=np.array([[3, 2, 1, 0]], np.uint8),
        levels=np.arange(4, dtype=np.float32),
        scales=np.array([[-2.0, 0.0]], np.float32),
        offsets=np.array([[1.0, 5.0]], np.float32),
        group=2,
    )
    assert grid.nearest(np.array([[-2.9, 9.0, 7.0, 7.0]], np.float32)).tolist() == [[2, 0, 1, 0]]
    lowest, highest = grid.ends()
    assert lowest.tolist() == [[-5.0, 5.0]]
    assert highest.tolist() == [[1.0, 5.0]]
    lowest, highest = grid.ends(beyond=0.5)
    assert lowest.tolist() == [[-6.0, 5.0]]
    assert highest.tolist() == [[2.0, 5.0]]


@pytest.mark.parametrize(("low", "count"), [(0, 256), (-128, 256), (-8, 16), (-1, 3)])
def test_whole_levels_change_exactly_at_their_edges(low: int, count: int) -> None:
    """Where values are an edge, or the next float32 to it, or far away."""
    levels = np.arange(low, low + count, dtype=np.float32)
    edges = (levels[1:] + levels[:-1]) / 2
    beside = [np.nextafter(edges, np.float32(end)) for end in (np.inf, -np.inf)]
    values = np.concatenate((edges, *beside, np.float32([0, 1e-30, -1e-30, 1e30, -1e30])))[None]
    grid = Grid(np.zeros(values.shape, np.uint8), levels, np.ones((1, 1), np.float32), None,
                values.shape[1])  # fmt: skip
    assert np.array_equal(grid.nearest(values), np.searchsorted(edges, values))


@pytest.mark.parametrize("kind", TERNARY, ids=lambda kind: kind.name)
def test_ternary_weights_are_held_without_an_error(kind: Q) -> None:
    signs = np.random.default_rng(7).integers(-1, 2, (8, 1024)).astype(np.float32)
    held = ggml_types.fresh(signs * np.float32(0.0371), kind)
    np.testing.assert_array_equal(np.sign(held.values()), signs)


def test_a_weight_of_two_is_no_ternary_weight() -> None:
    raw = ggml.quantize(np.ones((1, 256), np.float32), Q.TQ2_0)
    raw[0, 7] |= 3
    with pytest.raises(UserError, match="TQ2_0 code is 3"):
        decode(Q.TQ2_0, raw)


def test_a_type_that_holds_no_weights_is_refused() -> None:
    for ask in (ggml_types.codec, ggml_types.grid_codec, ggml_types.quantized_codec):
        with pytest.raises(UserError, match="I32 has no codes"):
            ask(Q.I32)


@every_type
def test_refit_renews_the_blocks_that_values_leave_and_no_others(
    normal: np.ndarray, kind: Q
) -> None:
    grid = ggml_types.fresh(normal[:4, :1024], kind)
    values = grid.values()
    assert ggml_types.refit(grid, values, kind) is grid
    values[2, 512] = 40.0
    again = ggml_types.refit(grid, values, kind)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    before = encode(kind, grid).reshape(4, -1, size)
    after = encode(kind, again).reshape(4, -1, size)
    moved = np.argwhere((before != after).any(axis=2)).tolist()
    assert moved == [[2, 512 // block]]
    assert again.values()[2, 512] == pytest.approx(40, rel=0.21)
    nearest = grid.with_codes(grid.nearest(values)).values()
    assert error(again.values(), values) < error(nearest, values)


def test_refit_begins_half_a_step_past_the_ends(normal: np.ndarray) -> None:
    # A new Q4_1 block would hold shifted values far better, its offset being free.
    grid = ggml_types.fresh(normal[:4, :1024], Q.Q4_1)
    steps = np.repeat(grid.scales, grid.group, axis=1)
    within, past = grid.values() + 0.4 * steps, grid.values() + 0.6 * steps
    assert ggml_types.refit(grid, within, Q.Q4_1) is grid
    assert error(ggml_types.refit(grid, past, Q.Q4_1).values(), past) < 0.01


def test_refit_keeps_a_block_that_a_new_one_would_not_better(normal: np.ndarray) -> None:
    grid = ggml_types.fresh(normal[:1, :256], Q.Q2_K)
    highest = grid.ends(beyond=0.6)[1]
    values = grid.values()
    values[0, 0] = highest[0, 0]
    assert ggml_types.refit(grid, values, Q.Q2_K) is grid
    # Nor is it replaced along with another that is bettered.
    grid = ggml_types.fresh(normal[:1, :512], Q.Q2_K)
    values = grid.values()
    values[0, 0], values[0, 256] = highest[0, 0], 40
    again = ggml_types.refit(grid, values, Q.Q2_K)
    np.testing.assert_array_equal(again.codes[0, :256], grid.codes[0, :256])
    np.testing.assert_array_equal(again.scales[0, :16], grid.scales[0, :16])
    assert (again.scales[0, 16:] != grid.scales[0, 16:]).any()


@pytest.mark.parametrize("kind", [Q.F32, Q.F16, Q.BF16])
def test_plain_floats_are_rounded_to_the_nearest(normal: np.ndarray, kind: Q) -> None:
    codec = ggml_types.codec(kind)
    assert isinstance(codec, ggml_types.FloatCodec)
    assert not codec.is_grid
    assert not ggml_types.has_grid(kind)
    # The last two: halfway between two numbers of BF16, and of F16.
    ties = (normal[4:5].view(np.uint32) & 0xFFFF0000 | 0x8000).view(np.float32)
    halves = (normal[5:6].view(np.uint32) & 0xFFFFE000 | 0x1000).view(np.float32)
    values = np.concatenate([normal[:2], 1e-6 * normal[2:4], 0 * normal[:1], ties, halves])
    grid = codec.round(values)
    raw = codec.encode(grid)
    np.testing.assert_array_equal(raw, ggml_types.as_rows(gguf.quants.quantize(values, kind)))
    again = codec.decode(raw, 2048)
    assert_same_bits(again.values(), grid.values())
    assert_same_bits(again.values(), gguf.quants.dequantize(raw, kind))
    np.testing.assert_array_equal(codec.encode(again), raw)
    with pytest.raises(UserError, match="plain float type"):
        ggml_types.fresh(values, kind)


@pytest.mark.parametrize("kind", [Q.F16, Q.BF16])
def test_all_finite_numbers_of_two_bytes_come_back(kind: Q) -> None:
    codec = ggml_types.codec(kind)
    assert isinstance(codec, ggml_types.FloatCodec)
    bits = np.arange(1 << 16, dtype="<u2")
    exponent = 0x7C00 if kind == Q.F16 else 0x7F80
    raw = bits[bits & exponent != exponent].view(np.uint8).reshape(1, -1)
    grid = codec.decode(raw, raw.shape[1] // 2)
    np.testing.assert_array_equal(codec.encode(grid), raw)
    np.testing.assert_array_equal(codec.encode(codec.round(grid.values())), raw)


def test_a_float_that_does_not_fit_is_refused() -> None:
    codec = ggml_types.codec(Q.F16)
    assert isinstance(codec, ggml_types.FloatCodec)
    with pytest.raises(UserError, match="70000 does not fit F16"):
        codec.round(np.array([[1.0, 7e4]], np.float32))
    infinite = ggml_types.as_rows(np.array([[1, 2], [3, np.inf]], np.float16))
    with pytest.raises(UserError, match="row 1 holds a weight that is not finite"):
        codec.decode(infinite, 2)


def test_sizes_that_do_not_fit_are_told() -> None:
    codec = ggml_types.codec(Q.Q4_K)
    raw = np.zeros((2, 144), np.uint8)
    with pytest.raises(UserError, match="rows of 200 do not fit Q4_K, whose blocks hold 256"):
        codec.decode(raw, 200)
    with pytest.raises(UserError, match="512 weights takes 288 bytes in Q4_K, but has 144"):
        codec.decode(raw, 512)
    with pytest.raises(UserError, match="uint8 of 2 dimensions, not uint8 of 1"):
        codec.decode(raw[0], 256)
    with pytest.raises(UserError, match="not float32 of 2"):
        codec.decode(raw.view(np.float32), 256)
    with pytest.raises(UserError, match="rows of 32 do not fit Q4_K"):
        ggml_types.fresh(np.zeros((2, 32), np.float32), Q.Q4_K)
    with pytest.raises(UserError, match="not finite"):
        ggml_types.fresh(np.full((2, 256), np.nan, np.float32), Q.Q4_K)


@every_type
def test_a_scale_that_is_not_finite_is_refused_where_it_is(kind: Q) -> None:
    raw = random_bytes(kind, 4, 3, seed=8)
    size = gguf.GGML_QUANT_SIZES[kind][1]
    block = raw.reshape(4, 3, size)[2, 1]
    if kind == Q.NVFP4:
        return  # Every byte is a scale.
    if kind == Q.MXFP4:
        block[0] = 255
    for at in HALVES[kind]:
        block[at : at + 2] = np.array([np.nan], "<f2").view(np.uint8)
    with pytest.raises(UserError, match=f"block 1 of row 2 has a {kind.name} scale"):
        decode(kind, raw)


def test_codes_and_grids_that_do_not_fit_are_bugs() -> None:
    grid = decode(Q.Q4_0, random_bytes(Q.Q4_0, 2, 2, seed=9))
    with pytest.raises(ValueError, match="code 16 in a grid of 16 levels"):
        grid.with_codes(np.full(grid.shape, 16, np.uint8))
    with pytest.raises(ValueError, match="not uint8"):
        grid.with_codes(grid.codes.astype(np.int64))
    with pytest.raises(ValueError, match=r"\(2, 32\) codes"):
        grid.with_codes(grid.codes[:, :32])
    # Alike in size, but with other levels.
    with pytest.raises(ValueError, match="another type, to be encoded as IQ4_NL"):
        encode(Q.IQ4_NL, grid)
    with pytest.raises(ValueError, match="groups of 24"):
        Grid(grid.codes, grid.levels, grid.scales, None, 24)
    with pytest.raises(ValueError, match="scales or offsets"):
        Grid(grid.codes, grid.levels, grid.scales[:, :1], None, 32)


@pytest.mark.parametrize("kind", [Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.MXFP4])
def test_simple_types_get_a_fresh_grid_without_ggml(
    normal: np.ndarray, kind: Q, request: pytest.FixtureRequest
) -> None:
    wanted = encode(kind, ggml_types.fresh(normal, kind))
    request.getfixturevalue("no_ggml")
    np.testing.assert_array_equal(encode(kind, ggml_types.fresh(normal, kind)), wanted)


@pytest.mark.parametrize("kind", [Q.Q4_K, Q.IQ4_XS, Q.NVFP4])
@pytest.mark.usefixtures("no_ggml")
def test_other_types_say_what_to_install(normal: np.ndarray, kind: Q) -> None:
    with pytest.raises(UserError, match=f"{kind.name} needs ggml.*pip install libggml-python"):
        ggml_types.fresh(normal, kind)


def test_an_older_ggml_is_not_asked_for_what_it_does_not_know(
    normal: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml, "library", lambda: object())
    monkeypatch.setattr(ggml, "available", lambda: True)
    with pytest.raises(UserError, match="this ggml does not know NVFP4: update it"):
        ggml_types.fresh(normal, Q.NVFP4)
