"""GGUF files written from model folders, judged by llama.cpp and mlx-lm on the same weights."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest
from gguf import LlamaFileType

from abl_mlx.behaviour.llamacpp import LlamaCpp
from convert.base.errors import UserError
from convert.gguf import file as gguf_file
from convert.gguf.file_types import FILE_TYPES
from convert.mlx.safetensors_files import TensorFiles
from convert.mlx_to_gguf import write_gguf
from convert.ollama.description import modelfile
from convert.ollama.turns import read_turns
from tests.support import tiny
from tests.support.agreement import greedy, interleave_rows, logprobs

TEXT = "How do I plan a garden? It's 1234 days."
LONG = "The bread is ready when it sounds hollow, and the train leaves at 10:45. " * 4

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def compare(
    model: nn.Module, gguf: Path, prompt: list[int], n: int = 32, n_ctx: int = 512
) -> float:
    """Assert equal greedy tokens; return the worst difference of a top-5 log-probability.

    Where mlx-lm's two likeliest tokens are within 0.01, either is right.
    """
    with LlamaCpp(gguf, n_ctx=n_ctx, n_parallel=1, n_threads=1) as runtime:
        reply = runtime.greedy(prompt, n)
        tops = runtime.top_logprobs(prompt, reply)
    rows = logprobs(model, prompt + reply)[len(prompt) - 1 : -1]
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
            assert reply == greedy(model, prompt, len(reply))
        longest = max(longest, len(reply))
        assert compare(model, report.path, prompt) < 0.05
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
    assert compare(model, report.path, prompt, n=12) < 0.05


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
