"""Folders written as GGUFs in every type: their errors, mixes and fall-backs."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from abl_mlx.behaviour.llamacpp import LlamaCpp
from convert.base.errors import UserError
from convert.gguf import file as gguf_file
from convert.gguf import ggml
from convert.gguf.file_types import FILE_TYPES
from convert.mlx.safetensors_files import TensorFiles
from convert.mlx_to_gguf import encode, write_gguf
from tests.support import tiny
from tests.support.agreement import float32, interleave_rows, logprobs

# Relative error of a Gaussian weight after a round trip, with some room.
ERRORS = {
    "F32": 0.0,
    "F16": 0.0,
    "BF16": 0.003,
    "Q8_0": 0.006,
    "Q6_K": 0.02,
    "Q5_0": 0.05,
    "Q5_1": 0.045,
    "Q5_K_S": 0.045,
    "Q5_K_M": 0.045,
    "Q4_0": 0.1,
    "Q4_1": 0.09,
    "Q4_K_S": 0.085,
    "Q4_K_M": 0.085,
    "Q3_K_S": 0.17,
    "Q3_K_M": 0.17,
    "Q3_K_L": 0.17,
    "Q2_K": 0.32,
    "IQ4_NL": 0.085,
    "IQ4_XS": 0.085,
    "IQ3_S": 0.17,
    "IQ3_M": 0.17,
    "TQ1_0": 0.85,
    "TQ2_0": 0.85,
    "MXFP4_MOE": 0.006,
}


def test_every_type_has_its_error_or_needs_an_importance_matrix(wide: Path, tmp_path: Path) -> None:
    for file_type in FILE_TYPES.keys() - ERRORS.keys():
        with pytest.raises(UserError, match="is useless without an importance matrix"):
            write_gguf(wide, tmp_path / "model.gguf", file_type=file_type)


@pytest.mark.parametrize("file_type", ERRORS)
def test_every_type_loads_and_answers_as_its_own_weights_do(
    wide: Path, tmp_path: Path, file_type: str
) -> None:
    report = write_gguf(wide, tmp_path / "model.gguf", file_type=file_type)
    keys = gguf_file.metadata(report.path)
    assert keys["general.file_type"] == FILE_TYPES[file_type][0]
    assert keys["general.quantization_version"] == 2
    # The reference computes with the very weights in the file, so all that is left is that
    # llama.cpp rounds activations to 8 bits before it multiplies (to 8 or 16 bits of mantissa for
    # the floating types).
    model = float32(wide)
    source = TensorFiles(wide)
    dequantized = []
    for name, target in report.tensors.items():
        stored = gguf_file.read_tensor(report.path, target)
        heads = {"q_proj": 4, "k_proj": 2}.get(name.split(".")[-2])
        if heads:
            rows = interleave_rows(np.arange(stored.shape[0]), heads)
            stored = stored[np.argsort(rows)]
        exact = np.array(source.read(name).astype(mx.float32))
        error = np.linalg.norm(stored - exact) / np.linalg.norm(exact)
        assert error <= ERRORS[file_type], name
        dequantized.append((name, mx.array(stored)))
    model.load_weights(dequantized)
    prompt = [508, 40, 300, 301, 12, 77]
    with LlamaCpp(report.path, n_ctx=256, n_parallel=1, n_threads=1) as runtime:
        reply = runtime.greedy(prompt, 8)
        tops = runtime.top_logprobs(prompt, reply)
    rows = logprobs(model, prompt + reply)[len(prompt) - 1 : -1]
    differences = [
        abs(float(row[token]) - logprob)
        for row, top in zip(rows, tops, strict=True)
        for token, logprob in top.items()
    ]
    assert max(differences) < {"F32": 0.02, "F16": 0.05, "BF16": 0.15}.get(file_type, 0.5)


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_every_architecture_loads_and_answers_in_k_quants(
    arch: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    wider = {**tiny.WIDE, "moe_intermediate_size": 256}
    settings = tiny.config(arch)
    wider["head_dim"] = 256 // settings["num_attention_heads"]
    wider = {key: value for key, value in wider.items() if key in settings}
    folder = tiny_folder(arch, tokenizer="native", **wider)
    exact = write_gguf(folder, tmp_path / "exact.gguf")
    report = write_gguf(folder, tmp_path / "model.gguf", file_type="Q6_K")
    assert set(report.types.values()) == {"F32", "Q6_K"}
    prompt = [7, 40, 300, 301, 12, 77]
    tops = []
    for path in (exact.path, report.path):
        with LlamaCpp(path, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
            tops.append(runtime.top_logprobs(prompt, [1], 512)[0])
    # Some 2% of noise in every weight moves the prediction a little, a wrong layout entirely.
    divergence = sum(math.exp(p) * (p - tops[1][token]) for token, p in tops[0].items())
    assert 0 < divergence < 0.05


def test_mixes_are_those_of_llama_quantize(wide: Path, tmp_path: Path) -> None:
    types = {
        file_type: write_gguf(wide, tmp_path / f"{file_type}.gguf", file_type=file_type).types
        for file_type in ("Q4_K_M", "Q2_K", "Q3_K_M", "Q4_0", "F16")
    }
    assert types["Q4_K_M"]["output.weight"] == "Q6_K"
    assert types["Q4_K_M"]["token_embd.weight"] == "Q4_K"
    # 3 layers: those from 7*3/8 = 2 on get more bits.
    assert [types["Q4_K_M"][f"blk.{i}.ffn_down.weight"] for i in range(3)] == [
        "Q4_K",
        "Q4_K",
        "Q6_K",
    ]
    assert types["Q2_K"]["blk.0.attn_v.weight"] == "Q3_K"
    assert types["Q2_K"]["blk.0.attn_output.weight"] == "Q3_K"
    assert types["Q2_K"]["blk.0.ffn_up.weight"] == "Q2_K"
    assert types["Q3_K_M"]["blk.0.attn_v.weight"] == "Q5_K"
    assert types["Q4_0"]["output.weight"] == "Q6_K"
    for chosen in types.values():
        assert {chosen[name] for name in chosen if "norm" in name} == {"F32"}
    short = write_gguf(wide, tmp_path / "short.gguf", file_type="q4_k")
    assert short.types == types["Q4_K_M"]


def test_rows_that_fit_no_k_quant_fall_back(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder("qwen2", tokenizer="native")
    for file_type, expected in (("Q4_K_M", "Q5_0"), ("Q2_K", "Q4_0"), ("Q6_K", "Q8_0")):
        report = write_gguf(folder, tmp_path / f"{file_type}.gguf", file_type=file_type)
        assert report.types["blk.0.ffn_up.weight"] == expected
        assert report.types["token_embd.weight"] == "Q8_0"
        with LlamaCpp(report.path, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
            assert runtime.greedy([1, 2, 3], 2)


def test_without_ggml_k_quants_fail_before_any_work(
    wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ggml, "_find", lambda: None)
    with pytest.raises(UserError, match=r"Q4_K needs ggml.*pip install libggml-python"):
        write_gguf(wide, tmp_path / "model.gguf", file_type="Q4_K_M")
    assert list(tmp_path.iterdir()) == []
    report = write_gguf(wide, tmp_path / "model.gguf", file_type="Q8_0")
    assert report.types["output.weight"] == "Q8_0"


def test_values_too_large_for_float16_are_named() -> None:
    values = np.full((2, 32), 70000.0, dtype=np.float32)
    with pytest.raises(UserError, match=r"blk\.0\.x\.weight holds values too large for F16"):
        encode(values, GGMLQuantizationType.F16, "blk.0.x.weight")
