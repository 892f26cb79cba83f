"""GGUF files written from model folders, judged by llama.cpp and mlx-lm on the same weights."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType, LlamaFileType
from mlx_lm.generate import generate_step
from mlx_lm.utils import load_model

from abl_mlx.behaviour.llamacpp import LlamaCpp
from convert.base.errors import UserError
from convert.gguf import file as gguf_file
from convert.gguf import ggml
from convert.gguf.file_types import FILE_TYPES
from convert.mlx.safetensors_files import TensorFiles
from convert.mlx_to_gguf import encode, write_gguf
from convert.ollama.description import modelfile
from convert.ollama.turns import read_turns
from tests.support import tiny


def interleave_rows(values: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (first half, second half) to alternating order."""
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


TEXT = "How do I plan a garden? It's 1234 days."
LONG = "The bread is ready when it sounds hollow, and the train leaves at 10:45. " * 4


def _float32(folder: Path, **config: Any) -> nn.Module:
    """The folder's model, computing in float32 from the stored weights."""
    model, _ = load_model(folder, model_config=config)
    model.set_dtype(mx.float32)
    return model


def _logprobs(model: nn.Module, tokens: list[int]) -> np.ndarray:
    logits = model(mx.array([tokens]))[0].astype(mx.float32)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def _greedy(model: nn.Module, prompt: list[int], n: int) -> list[int]:
    """mlx-lm's own next n tokens, one at a time, through its cache."""
    steps = generate_step(mx.array(prompt), model, max_tokens=n)
    return [int(token) for token, _ in steps]


def _compare(
    model: nn.Module, gguf: Path, prompt: list[int], n: int = 32, n_ctx: int = 512
) -> float:
    """Assert equal greedy tokens; return the worst difference of a top-5 log-probability.

    Where mlx-lm's two likeliest tokens are within 0.01, either is right.
    """
    with LlamaCpp(gguf, n_ctx=n_ctx, n_parallel=1, n_threads=1) as runtime:
        reply = runtime.greedy(prompt, n)
        tops = runtime.top_logprobs(prompt, reply)
    rows = _logprobs(model, prompt + reply)[len(prompt) - 1 : -1]
    assert all(row.max() - row[token] < 0.01 for row, token in zip(rows, reply, strict=True))
    return max(
        abs(float(row[token]) - logprob)
        for row, top in zip(rows, tops, strict=True)
        for token, logprob in top.items()
    )


@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_llama_cpp_answers_as_mlx_lm_does(
    arch: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tiny_folder(arch, tokenizer="native")
    report = write_gguf(folder, tmp_path / "model.gguf")
    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    longest = 0
    # Several prompts: a random model may end its reply early.
    for text in (TEXT, "Where is the sea?"):
        prompt = tokenizer.encode(text)
        with LlamaCpp(report.path, n_ctx=256, n_parallel=1, n_threads=1) as runtime:
            assert runtime.tokenize(text) == prompt
            reply = runtime.greedy(prompt, 32)
        if text == TEXT:
            assert reply == _greedy(model, prompt, len(reply))
        longest = max(longest, len(reply))
        assert _compare(model, report.path, prompt) < 0.05
    assert longest == 32
    assert sorted(report.tensors) == sorted(TensorFiles(folder).names)
    assert report.bytes == report.path.stat().st_size
    types = {name: kind.name for name, kind in gguf_file.tensor_types(report.path).items()}
    assert types == report.types


LLAMA3_SCALING = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama3 rope": ("llama", {"rope_scaling": LLAMA3_SCALING, "rope_theta": 500000.0}),
    "linear rope": ("llama", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "yarn": ("qwen2", {"rope_scaling": YARN}),
    "head_dim and biases": ("llama", {"head_dim": 32, "attention_bias": True, "mlp_bias": True}),
    "tied llama": ("llama", {"tie_word_embeddings": True}),
    "untied qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "interleaved rope": ("llama", {"rope_traditional": True}),
    "granite biases": ("granite", {"attention_bias": True, "mlp_bias": True}),
    "partial rotary phi3": ("phi3", {"partial_rotary_factor": 0.5}),
    "longrope phi3": (
        "phi3",
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {
                "type": "longrope",
                "short_factor": [1.0 + 0.05 * i for i in range(8)],
                "long_factor": [1.0 + 0.4 * i for i in range(8)],
            },
        },
    ),
    "gemma2 softcaps and scale": (
        "gemma2",
        {
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 8,
        },
    ),
    "gemma3 scale": ("gemma3_text", {"query_pre_attn_scalar": 8}),
    "gemma3 short window": ("gemma3_text", {"sliding_window": 16}),
    "gemma3 local base": ("gemma3_text", {"rope_local_base_freq": 500.0}),
    "first gemma": ("gemma2", {"model_type": "gemma"}),
    "gemma3 linear rope": ("gemma3_text", {"rope_scaling": {"type": "linear", "factor": 8.0}}),
    "gemma3 pattern of six": (
        "gemma3_text",
        {"sliding_window": 16, "sliding_window_pattern": 6, "num_hidden_layers": 7},
    ),
    "three shards": ("qwen2", {"shards": 3}),
    "bfloat16": ("llama", {"dtype": "bfloat16"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_variants_answer_as_in_mlx_lm(variant: str, tmp_path: Path) -> None:
    arch, overrides = VARIANTS[variant]
    folder = tiny.write_model(tmp_path / "model", arch, tokenizer="native", **overrides)
    report = write_gguf(folder, tmp_path / "model.gguf", file_type="F32")
    model, tokenizer = mlx_lm.load(str(folder))
    model.set_dtype(mx.float32)
    prompt = tokenizer.encode(LONG)
    assert len(prompt) > 64
    # Weights are exact in F32; what is left is llama.cpp's float16 KV cache.
    assert _compare(model, report.path, prompt, n=12) < 0.05


def test_configs_and_names_of_transformers_5(tmp_path: Path) -> None:
    # Nested rope parameters, a nested text config and prefixed tensor names.
    folder = tiny.write_model(tmp_path / "model", "gemma3_text", tokenizer="native")
    plain = write_gguf(folder, tmp_path / "plain.gguf")
    config = json.loads((folder / "config.json").read_text())
    nested = {**config, "model_type": "gemma3_text"}
    nested["rope_parameters"] = {
        "full_attention": {"rope_type": "default", "rope_theta": nested.pop("rope_theta")},
        "sliding_attention": {
            "rope_type": "default",
            "rope_theta": nested.pop("rope_local_base_freq"),
        },
    }
    pattern = nested.pop("sliding_window_pattern")
    nested["layer_types"] = [
        "full_attention" if (layer + 1) % pattern == 0 else "sliding_attention"
        for layer in range(nested["num_hidden_layers"])
    ]
    outer = {"model_type": "gemma3", "text_config": nested, "eos_token_id": config["eos_token_id"]}
    (folder / "config.json").write_text(json.dumps(outer))
    weights = mx.load(str(folder / "model.safetensors"))
    weights = {f"language_model.{name}": value for name, value in weights.items()}
    weights["vision_tower.patch.weight"] = mx.zeros((4, 4))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    report = write_gguf(folder, tmp_path / "nested.gguf")
    assert report.types == plain.types
    for name in plain.types:
        np.testing.assert_array_equal(
            gguf_file.read_tensor(report.path, name), gguf_file.read_tensor(plain.path, name)
        )
    both = gguf_file.metadata(plain.path), gguf_file.metadata(report.path)
    assert both[0] == both[1]


def test_rope_parameters_of_a_llama(tmp_path: Path) -> None:
    folder = tiny.write_model(
        tmp_path / "model", "llama", rope_scaling=LLAMA3_SCALING, rope_theta=500000.0
    )
    plain = write_gguf(folder, tmp_path / "plain.gguf")
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {**config.pop("rope_scaling"), "rope_theta": 500000.0}
    del config["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config))
    nested = write_gguf(folder, tmp_path / "nested.gguf")
    assert gguf_file.metadata(plain.path) == gguf_file.metadata(nested.path)
    factors = gguf_file.read_tensor(nested.path, "rope_freqs.weight")
    np.testing.assert_array_equal(factors, gguf_file.read_tensor(plain.path, "rope_freqs.weight"))
    assert factors[0] == 1.0
    assert factors[-1] == 8.0


def test_stacked_experts_of_mlx_equal_separate_ones(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "qwen3_moe")
    separate = write_gguf(folder, tmp_path / "separate.gguf")
    config = json.loads((folder / "config.json").read_text())
    config["num_local_experts"] = config.pop("num_experts")
    (folder / "config.json").write_text(json.dumps(config))
    weights = mx.load(str(folder / "model.safetensors"))
    for layer in range(3):
        for part in ("gate_proj", "up_proj", "down_proj"):
            at = f"model.layers.{layer}.mlp"
            experts = [weights.pop(f"{at}.experts.{e}.{part}.weight") for e in range(4)]
            weights[f"{at}.switch_mlp.{part}.weight"] = mx.stack(experts)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    stacked = write_gguf(folder, tmp_path / "stacked.gguf")
    assert stacked.path.read_bytes() == separate.path.read_bytes()
    name = "blk.1.ffn_down_exps.weight"
    np.testing.assert_array_equal(
        gguf_file.read_tensor(stacked.path, name),
        np.array(weights["model.layers.1.mlp.switch_mlp.down_proj.weight"].astype(mx.float32)),
    )


# --------------------------------------------------------------------------------------------------
# Types


@pytest.fixture(scope="module")
def wide(tiny_folder: Callable[..., Path]) -> Path:
    return tiny_folder("llama", tokenizer="native", **tiny.WIDE)


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
    model = _float32(wide)
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
    rows = _logprobs(model, prompt + reply)[len(prompt) - 1 : -1]
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


# --------------------------------------------------------------------------------------------------
# Edits and metadata


@pytest.mark.parametrize("file_type", ["F32", "Q8_0"])
def test_an_edit_is_what_the_file_holds(wide: Path, tmp_path: Path, file_type: str) -> None:
    source = "model.layers.1.self_attn.o_proj.weight"
    permuted = "model.layers.0.self_attn.q_proj.weight"
    seen: dict[str, Any] = {}

    def project(weight: mx.array) -> mx.array:
        seen["dtype"], seen["weight"] = weight.dtype, np.array(weight)
        direction = mx.ones((weight.shape[0],)) / math.sqrt(weight.shape[0])
        seen["result"] = np.array(weight - mx.outer(direction, direction @ weight))
        return mx.array(seen["result"])

    report = write_gguf(
        wide,
        tmp_path / "model.gguf",
        file_type=file_type,
        edits={source: project, permuted: lambda weight: weight * 2},
    )
    assert seen["dtype"] == mx.float32
    files = TensorFiles(wide)
    np.testing.assert_array_equal(seen["weight"], np.array(files.read(source).astype(mx.float32)))
    stored = gguf_file.read_tensor(report.path, report.tensors[source])
    assert stored.shape == seen["result"].shape
    tolerance = 0 if file_type == "F32" else np.abs(seen["result"]).max() / 200
    np.testing.assert_allclose(stored, seen["result"], atol=tolerance, rtol=0)
    doubled = 2 * interleave_rows(np.array(files.read(permuted).astype(mx.float32)), 4)
    stored = gguf_file.read_tensor(report.path, report.tensors[permuted])
    np.testing.assert_allclose(stored, doubled, atol=np.abs(doubled).max() / 200, rtol=0)


def test_an_expert_is_edited_alone(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "qwen3_moe")
    source = "model.layers.2.mlp.experts.3.down_proj.weight"
    edits = {source: lambda weight: -weight}
    plain = write_gguf(folder, tmp_path / "plain.gguf")
    edited = write_gguf(folder, tmp_path / "edited.gguf", edits=edits)
    name = edited.tensors[source]
    before, after = (gguf_file.read_tensor(r.path, name) for r in (plain, edited))
    np.testing.assert_array_equal(after[3], -before[3])
    np.testing.assert_array_equal(after[:3], before[:3])


def test_edits_that_cannot_be_made_are_refused(wide: Path, tmp_path: Path) -> None:
    out = tmp_path / "model.gguf"
    with pytest.raises(UserError, match=r"no\.such\.weight is to be edited, but it does not exist"):
        write_gguf(wide, out, edits={"no.such.weight": lambda weight: weight})
    name = "model.norm.weight"
    with pytest.raises(UserError, match=r"edit of model\.norm\.weight changes its shape"):
        write_gguf(wide, out, edits={name: lambda weight: weight[:3]})
    with pytest.raises(UserError, match=r"model\.norm\.weight after its edit holds NaN"):
        write_gguf(wide, out, edits={name: lambda weight: weight * math.nan})
    assert list(tmp_path.iterdir()) == []


def test_metadata_of_every_kind_is_in_the_file(wide: Path, tmp_path: Path) -> None:
    given = {
        "general.tags": ["abliterated", "mlx"],
        "general.base_model.count": 1,
        "general.base_model.0.name": "Basis",
        "abl_mlx.version": "0.1.0",
        "abl_mlx.strength": 0.5,
        "abl_mlx.edited": True,
        "abl_mlx.seed": -7,
        "abl_mlx.none": [],
        "general.name": "Given",
    }
    report = write_gguf(wide, tmp_path / "model.gguf", metadata=given)
    keys = gguf_file.metadata(report.path)
    del given["abl_mlx.none"]
    assert {key: keys[key] for key in given} == given
    assert type(keys["abl_mlx.edited"]) is bool
    assert keys["general.architecture"] == "llama"
    assert keys["general.type"] == "model"
    assert keys["llama.rope.dimension_count"] == 64
    assert keys["tokenizer.ggml.pre"] == "llama-bpe"
    assert len(keys["tokenizer.ggml.tokens"]) == tiny.VOCAB_SIZE
    named = write_gguf(wide, tmp_path / "named.gguf")
    assert gguf_file.metadata(named.path)["general.name"] == wide.name
    with pytest.raises(UserError, match=r"general\.architecture is fixed"):
        write_gguf(wide, tmp_path / "no.gguf", metadata={"general.architecture": "gemma"})
    # A number outside uint32 and llama.cpp still loads all of it.
    with LlamaCpp(report.path, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
        assert runtime.greedy([1, 2, 3], 2)


def test_names_with_phi3_in_them_load(tmp_path: Path) -> None:
    # llama.cpp wants certain tokens in a vocabulary when general.name says Phi-3.
    for name in ("Phi-3-mini", "my-phi3"):
        folder = tiny.write_model(tmp_path / name, "phi3", tokenizer="native")
        report = write_gguf(folder, tmp_path / f"{name}.gguf", metadata={"general.name": name})
        with LlamaCpp(report.path, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
            assert runtime.greedy([1, 2, 3], 2)


def test_progress_counts_tensors(wide: Path, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = write_gguf(
        wide, tmp_path / "model.gguf", progress=lambda done, of: seen.append((done, of))
    )
    assert seen == [(i + 1, len(report.types)) for i in range(len(report.types))]


# --------------------------------------------------------------------------------------------------
# Refusals


def _change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "llama")
    out = tmp_path / "out.gguf"
    weights = mx.load(str(folder / "model.safetensors"))
    original = (folder / "config.json").read_text()

    def refuses(words: str, file_type: str = "F16") -> None:
        with pytest.raises(UserError, match=words):
            write_gguf(folder, out, file_type=file_type)
        assert not out.exists()

    refuses("Q7 is not a supported GGUF file type", "Q7")
    for changes, words in (
        ({"model_type": "mamba"}, 'model_type "mamba", which cannot be written'),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling of type "dynamic"'),
        ({"rope_scaling": {**YARN, "beta_fast": 16.0}}, "sets beta_fast to 16"),
        ({"max_position_embeddings": None}, "config.json has no max_position_embeddings"),
    ):
        _change(folder, **changes)
        refuses(words)
        (folder / "config.json").write_text(original)
    for name, value, words in (
        ("model.layers.0.mlp.extra.weight", mx.zeros((2, 2)), r"mlp\.extra\.weight has no place"),
        ("model.layers.9.mlp.up_proj.weight", mx.zeros((2, 2)), r"layers\.9\.mlp\.up_proj"),
        ("model.norm.weight", mx.full((64,), math.inf), r"model\.norm\.weight holds NaN or inf"),
        (
            "model.norm.scales",
            mx.zeros((64,)),
            r"quantized \(model\.norm\.scales\) in an",
        ),
        ("model.norm.weight", mx.zeros((64,), mx.uint32), r"norm\.weight .* stored as U32"),
    ):
        mx.save_safetensors(str(folder / "model.safetensors"), {**weights, name: value})
        refuses(words)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    out.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        write_gguf(folder, out)
    assert out.read_text() == "mine"


def test_missing_experts_are_counted(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "qwen3_moe")
    weights = mx.load(str(folder / "model.safetensors"))
    del weights["model.layers.1.mlp.experts.2.up_proj.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(UserError, match=r"made of experts \[0, 1, 3\].*there are 4"):
        write_gguf(folder, tmp_path / "out.gguf")


def test_experts_that_llama_cpp_weighs_otherwise_are_refused(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "qwen3_moe", norm_topk_prob=False)
    with pytest.raises(UserError, match="norm_topk_prob"):
        write_gguf(folder, tmp_path / "out.gguf")


# --------------------------------------------------------------------------------------------------
# Reading back


def test_reading_names_file_and_tensor(wide: Path, tmp_path: Path) -> None:
    report = write_gguf(wide, tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"model\.gguf has no tensor named blk\.99"):
        gguf_file.read_tensor(report.path, "blk.99.ffn_down.weight")
    with pytest.raises(UserError, match=r"missing\.gguf is no file"):
        gguf_file.metadata(tmp_path / "missing.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"nonsense" * 9)
    with pytest.raises(UserError, match=r"bad\.gguf is no readable GGUF"):
        gguf_file.tensor_types(tmp_path / "bad.gguf")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_read_as_mlx_reads_them(tmp_path: Path, dtype: str) -> None:
    folder = tiny.write_model(tmp_path / "model", "llama", dtype=dtype, shards=2)
    expected: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        expected.update(mx.load(str(file)))
    with TensorFiles(folder) as files:
        assert sorted(files.names) == sorted(expected)
        for name in files.names:
            array = files.read(name)
            assert array.dtype == expected[name].dtype
            assert mx.array_equal(array, expected[name]).item()
            info = files.info(name)
            with open(info.file, "rb") as stream:
                stream.seek(info.offset)
                assert stream.read(info.nbytes) == bytes(files.bytes(name))
    (folder / "model.safetensors.index.json").unlink()
    assert sorted(TensorFiles(folder).names) == sorted(expected)


def _safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(first: int, last: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\1\2", "only 2 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (_safetensors({}, length=1 << 60), "header claims"),
        (_safetensors(b"{nonsense"), "not valid JSON"),
        (_safetensors(b"[]"), "no JSON object"),
        (_safetensors(b'{"a": {}, "a": {"b": 1}}'), '"a" appears twice'),
        (_safetensors({"a": {"dtype": "F32"}}), "a lacks dtype, shape or data_offsets"),
        (_safetensors({"a": _entry(0, 4, [1], "F6")}, b"1234"), "stored as F6"),
        (_safetensors({"a": _entry(0, 4, [-1])}, b"1234"), "malformed shape"),
        (_safetensors({"a": _entry(0, 4, [2])}, b"1234"), "8 bytes, but spans 4"),
        (_safetensors({"a": _entry(0, 8, [2])}, b"1234"), "it is truncated"),
        (_safetensors({"a": _entry(0, 4, [1]), "b": _entry(2, 6, [1])}, b"123456"), "overlaps"),
        (_safetensors({"a": _entry(4, 8, [1])}, b"12345678"), "belong to no tensor"),
        (_safetensors({"a": _entry(0, 4, [1])}, b"12345678"), "after the last tensor"),
    ],
)
def test_malformed_safetensors_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        TensorFiles(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_an_index_that_disagrees_is_named(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "llama", shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    for file, words in (
        ("../model.safetensors", "points outside its folder"),
        ("model-00009-of-00009.safetensors", "is not there"),
    ):
        changed = {"weight_map": {**content["weight_map"], first: file}}
        index.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            TensorFiles(folder)
    index.write_text(
        json.dumps(
            {"weight_map": {**content["weight_map"], "ghost": "model-00001-of-00002.safetensors"}}
        )
    )
    with pytest.raises(UserError, match="places ghost in"):
        TensorFiles(folder)
    with pytest.raises(UserError, match=r"no model\*\.safetensors"):
        TensorFiles(tmp_path)


# --------------------------------------------------------------------------------------------------
# Ollama


@pytest.mark.parametrize("kind", ["bpe-qwen2", "bpe-llama3", "spm-llama", "spm-gemma"])
def test_the_modelfile_says_what_the_chat_template_says(tmp_path: Path, kind: str) -> None:
    folder = tiny.write_model(tmp_path / "model", "llama", tokenizer=kind, num_hidden_layers=1)
    (folder / "LICENSE").write_text("Do as you like.")
    report = write_gguf(folder, tmp_path / "tiny.gguf")
    text = modelfile(report.path, folder)
    assert text.startswith("FROM ./tiny.gguf\n")
    special = tiny.special_tokens(kind)
    assert f'PARAMETER stop "{special["turn_end"]}"' in text
    assert f'PARAMETER stop "{special["eos"]}"' in text
    assert 'LICENSE """Do as you like."""' in text
    assert 'TEMPLATE """' in text
    # Ollama puts the bos token there itself.
    assert special.get("bos", "\0") not in text.split("PARAMETER")[0]
    keys = gguf_file.metadata(report.path)
    turns = read_turns(
        keys["tokenizer.chat_template"], special.get("bos", ""), special["turn_end"], drop_bos=True
    )
    assert turns is not None
    chat = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Bye"},
    ]
    with LlamaCpp(report.path, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
        assert turns.render(chat) == runtime.render(chat)


def test_a_template_with_a_default_system_message_keeps_it() -> None:
    source = (
        "{% if messages[0]['role'] != 'system' %}"
        "<|im_start|>system\nBe good.<|im_end|>\n{% endif %}" + tiny._CHATML
    )
    turns = read_turns(source)
    assert turns is not None
    assert turns.opening == "<|im_start|>system\nBe good.<|im_end|>\n"
    assert turns.go().startswith(
        "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n"
        "{{ else }}<|im_start|>system\n"
    )


def test_what_ollama_cannot_say_is_a_comment(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "llama", num_hidden_layers=1)
    (folder / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message['content'] | upper }}{% endfor %}"
    )
    report = write_gguf(folder, tmp_path / "tiny.gguf")
    text = modelfile(report.path)
    assert 'TEMPLATE "' not in text
    assert "# The model's chat template does more than" in text


def test_file_types_are_llama_cpps() -> None:
    for name, (file_type, kind) in FILE_TYPES.items():
        assert file_type.name.removeprefix("MOSTLY_").removeprefix("ALL_") == name
        assert name.split("_")[0] == kind.name.split("_")[0]
    assert LlamaFileType.MOSTLY_Q4_K_M == 15
