"""Weights that stay packed in memory: the same model as with all of them unpacked."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf.quants import dequantize

from convert.base.errors import UserError
from convert.gguf import ggml, ggml_types
from convert.gguf.file import GgufSource
from convert.gguf.rewrite import Replacement, rewrite
from convert.gguf_to_mlx import layout, load
from convert.mlx import packed, packed_forms, packed_modules, types
from tests.support import tiny_gguf
from tests.support.agreement import logprobs
from tests.support.gguf_recipes import RECIPES

PROMPT = [5, 77, 301, 12, 450, 88, 19, 260, 7, 333, 41]

TYPES = [
    Q.F16, Q.BF16, Q.Q4_0, Q.Q4_1, Q.Q5_0, Q.Q5_1, Q.Q8_0, Q.Q2_K, Q.Q3_K, Q.Q4_K, Q.Q5_K, Q.Q6_K,
    Q.IQ4_NL, Q.IQ4_XS, Q.MXFP4, Q.NVFP4, Q.TQ1_0, Q.TQ2_0, Q.IQ2_XXS,
]  # fmt: skip

# They are held as IQ2_XXS is, and ggml takes seconds to encode in some of them.
OTHER_TYPES = [
    pytest.param(
        kind, marks=pytest.mark.slow if kind in (Q.IQ1_S, Q.IQ1_M) else pytest.mark.by_turns(3)
    )
    for kind in ggml_types.CODEBOOK_TYPES
    if kind != Q.IQ2_XXS
]


def encoded(values: np.ndarray, kind: Q) -> np.ndarray:
    codec = ggml_types.codec(kind)
    if kind in (Q.F16, Q.BF16):
        return codec.encode(codec.round(values))
    if kind in ggml_types.CODEBOOK_TYPES:
        return ggml.quantize(values, kind, np.ones(values.shape[-1], np.float32))
    return codec.encode(ggml_types.fresh(values, kind))


@pytest.mark.parametrize("kind", [*TYPES, *OTHER_TYPES])
def test_unpacked_rows_are_what_gguf_py_reads(kind: Q) -> None:
    values = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    raw = encoded(values, kind)
    form, parts = packed_forms.pack_rows(raw, 512, kind)
    arrays = {name: mx.array(part) for name, part in parts.items()}
    if kind == Q.BF16:
        arrays["codes"] = arrays["codes"].view(mx.bfloat16)
    expected = dequantize(raw, kind).reshape(6, 512)
    found = np.array(form.unpack(arrays))
    # Q4_K and Q5_K scales are rounded to float16 on their way; a weight is their difference.
    limit = 2**-11 if kind in (Q.Q4_K, Q.Q5_K) else 1e-6
    assert np.abs(found - expected).max() <= limit * np.abs(expected).max() * 2
    again = np.empty_like(expected)
    form.unpack_on_cpu(parts, again)
    assert np.abs(again - expected).max() <= limit * np.abs(expected).max() * 2
    size = sum(part.nbytes for part in parts.values())
    # TQ1_0 has five weights in a byte, here four.
    assert size <= (1.23 if kind == Q.TQ1_0 else 1.13) * raw.nbytes


def test_rows_of_codebooks_are_unpacked_without_ggml(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)
    raw = encoded(values, Q.IQ2_XXS)
    form, parts = packed_forms.pack_rows(raw, 512, Q.IQ2_XXS)
    monkeypatch.setattr(ggml, "available", lambda: False)
    found = np.empty((6, 512), np.float32)
    form.unpack_on_cpu(parts, found)
    assert (found == dequantize(raw, Q.IQ2_XXS).reshape(6, 512)).all()


def test_a_scale_that_is_not_finite_is_refused_while_packing() -> None:
    raw = encoded(np.ones((2, 512), np.float32), Q.IQ2_XXS)
    raw[1, :2] = np.frombuffer(np.array(np.inf, "<f2").tobytes(), np.uint8)
    with pytest.raises(UserError, match="block 0 of row 1 has a IQ2_XXS scale"):
        packed_forms.pack_rows(raw, 512, Q.IQ2_XXS)


@pytest.mark.parametrize("kind", sorted(types.AFFINE))
def test_no_weight_moves_by_more_than_the_rounding_of_its_scale(kind: Q) -> None:
    values = np.random.default_rng(1).standard_normal((64, 512)).astype(np.float32)
    raw = ggml.quantize(values, kind)
    found = types.repack(raw, 512, kind)
    grid = ggml_types.grid_codec(kind).decode(raw, 512)
    again = mx.dequantize(
        mx.array(found.weight), mx.array(found.scales.astype(np.float32)),
        mx.array(found.biases.astype(np.float32)), group_size=32, bits=found.bits,
    )  # fmt: skip
    assert (types.unpack(found.weight, found.bits) == grid.codes).all()
    # |code| ulps of the scale and one of the offset, half an ulp each.
    reach = (grid.codes.reshape(64, -1, 32) * np.abs(found.scales)[..., None]) + np.abs(
        found.biases
    )[..., None]
    moved = np.abs(np.array(again) - grid.values()).reshape(64, -1, 32)
    assert (moved <= reach * 2**-11 + 1e-9).all()
    if kind not in (Q.Q4_K, Q.Q5_K):
        assert moved.max() < 1e-6  # these scales are float16 to begin with


@pytest.mark.parametrize(("size", "dtype"), [(1e-5, np.float16), (3e4, np.float32)])
def test_tiny_and_huge_scales_lose_nothing(size: float, dtype: type) -> None:
    values = size * np.random.default_rng(1).standard_normal((4, 256)).astype(np.float32)
    raw = ggml.quantize(values, Q.Q8_0)
    found = types.repack(raw, 256, Q.Q8_0)
    assert found.scales.dtype == dtype
    expected = dequantize(raw, Q.Q8_0).reshape(4, 256)
    scales, biases = (mx.array(part.astype(np.float32)) for part in (found.scales, found.biases))
    again = mx.dequantize(mx.array(found.weight), scales, biases, 32, 8)
    assert np.abs(np.array(again) - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tiny")
    return {
        name: tiny_gguf.write(folder / f"{number}.gguf", RECIPES[name], Q.F32)
        for number, name in enumerate(("qwen2", "mixtral", "gpt-oss"))
    }


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("name", ["qwen2", "mixtral", "gpt-oss"])
def test_a_packed_model_is_the_same_model(
    name: str, kind: Q, floats: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it runs on a CPU (through NumPy), on a GPU, and there with MLX's own modules."""
    # Small chunks, so that products and experts are joined from several.
    monkeypatch.setattr(packed, "CHUNK", 256 * 150)
    path = tmp_path / "tiny.gguf"
    with GgufSource(floats[name]) as source:
        tensors = {}
        for tensor, entry in source.tensors.items():
            if len(entry.shape) > 1 and "gate_inp" not in tensor:
                raw = encoded(source.values(tensor).reshape(-1, entry.shape[-1]), kind)
                tensors[tensor] = Replacement(kind, entry.shape, lambda raw=raw: iter([raw]))
        rewrite(source, path, tensors=tensors)
    with GgufSource(path) as source:
        plain = logprobs(load(source, widen=True).model, PROMPT)
        for on_cpu, native in ((True, False), (False, False), (False, True)):
            monkeypatch.setattr(packed, "runs_on_cpu", lambda on_cpu=on_cpu: on_cpu)
            small = load(source, widen=False, native=native).model
            kinds = {type(module).__name__ for _, module in small.named_modules()}
            if native and types.is_repacked(kind):
                assert "QuantizedLinear" in kinds
                assert "PackedLinear" not in kinds
            else:
                assert {"PackedLinear", "PackedEmbedding"} <= kinds
                assert "QuantizedLinear" not in kinds
            if name != "qwen2":
                assert kinds & {"PackedSwitchLinear", "QuantizedSwitchLinear"}
            assert np.abs(logprobs(small, PROMPT) - plain).max() < 0.01


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("scales", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [(2, 32, "affine"), (3, 64, "affine"), (4, 64, "affine"), (5, 32, "affine"),
     (6, 64, "affine"), (8, 128, "affine"), (4, 32, "mxfp4")],
)  # fmt: skip
@pytest.mark.parametrize("name", ["qwen2", "mixtral", "gpt-oss"])
def test_a_quantized_folders_matrices_are_held_as_they_are(
    name: str, bits: int, group: int, mode: str, scales: mx.Dtype, floats: dict[str, Path]
) -> None:
    with GgufSource(floats[name]) as source:
        model = layout(source).model
    model.set_dtype(scales)
    nn.quantize(model, group_size=group, bits=bits, mode=mode)
    model.set_dtype(mx.float32)  # the scales stay what they are; MLX then computes in float32
    before = logprobs(model, PROMPT)
    for _, module in model.named_modules():
        if "scales" in module and mode == "affine":
            module.scales, module.biases = (
                module[part].astype(scales) for part in ("scales", "biases")
            )
    packed_modules.hold(model)
    kinds = {type(module).__name__ for _, module in model.named_modules()}
    assert "PackedLinear" in kinds
    assert not any(kind.startswith("Quantized") for kind in kinds)
    assert np.abs(logprobs(model, PROMPT) - before).max() < 2e-3


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_unpacked_where_a_file_does_not_align_them(bits):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, (5, 96)).astype(np.uint8)
    packed = types.pack(codes, bits).view(np.uint8)
    shifted = np.append(np.uint8(0), packed)[1:].reshape(packed.shape)
    assert not shifted.view(np.uint32).flags.aligned
    assert np.array_equal(types.unpack(shifted, bits), codes)
