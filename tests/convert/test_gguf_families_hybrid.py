"""Qwen's mixtures and hybrids, gpt-oss and LFM2 from GGUF: layouts, types, writers, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from mlx.utils import tree_flatten
from mlx_lm import load as load_folder
from mlx_lm.models.switch_layers import QuantizedSwitchLinear

from convert.architectures import gguf_writers
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx import Layout, layout, load, write_folder
from tests.convert.test_gguf_to_mlx import LIMITS, PROMPT
from tests.support import tiny_gguf
from tests.support.agreement import disagreement, logprobs
from tests.support.gguf_recipes import gpt_oss, lfm2, qwen
from tests.support.tiny_gguf import Recipe

RECIPES = {**qwen.RECIPES, **qwen.VARIANTS, **gpt_oss.RECIPES, **lfm2.RECIPES}


def _model(path: Path, **options: Any) -> nn.Module:
    with GgufSource(path) as source:
        return load(source, **options).model


def _layout(path: Path) -> Layout:
    with GgufSource(path) as source:
        return layout(source)


# --------------------------------------------------------------------------------------------------
# Layouts and types


@pytest.mark.parametrize("name", qwen.VARIANTS)
def test_other_layouts_of_the_same_models_answer_as_in_llama_cpp(name: str, tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", qwen.VARIANTS[name])
    assert disagreement(_model(path), path, PROMPT, near=LIMITS["F16"]) < LIMITS["F16"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_written_folder_is_what_mlx_lm_loads(name: str, tmp_path: Path) -> None:
    """mlx-lm's sanitize, which runs on loading, leaves the parameters as they are."""
    path = tiny_gguf.write(tmp_path / "tiny.gguf", RECIPES[name])
    with GgufSource(path) as source:
        write_folder(source, tmp_path / "folder")
        model = load(source).model
    again = load_folder(str(tmp_path / "folder"))[0]
    assert np.abs(logprobs(again, PROMPT) - logprobs(model, PROMPT)).max() < 0.02


@pytest.mark.parametrize("name", RECIPES)
def test_every_writer_is_one_parameter(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    path = tiny_gguf.write(tmp_path / "tiny.gguf", recipe)
    metadata = {f"{recipe.architecture}.{key}": value for key, value in recipe.keys.items()}
    found = _layout(path)
    places = found.places()
    for writer in gguf_writers.find(recipe.architecture, recipe.tensors, metadata):
        for tensor in writer.parameters:
            (parameter,) = places[tensor]
            weight = found.weights[parameter]
            assert len(weight.pieces) == 1
            assert weight.pieces[0].rows is None
            assert weight.change is None


def test_blocks_whose_columns_move_stay_quantized(tmp_path: Path) -> None:
    recipe = qwen.RECIPES["qwen35, and drafting"]
    path = tiny_gguf.write(tmp_path / "tiny.gguf", recipe, Q.Q4_K)
    model = _model(path, native=True, widen=False)
    modules = dict(model.named_modules())
    for name in ("out_proj", "in_proj_qkv", "in_proj_z"):
        module = modules[f"language_model.model.layers.0.linear_attn.{name}"]
        assert isinstance(module, nn.QuantizedLinear), name
    assert np.abs(logprobs(model, PROMPT) - logprobs(_model(path), PROMPT)).max() < 0.02


def test_drafting_blocks_have_no_place(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", qwen.RECIPES["qwen3next, and drafting"])
    found = _layout(path)
    assert found.config["text_config"]["num_hidden_layers"] == 4
    assert not any(tensor.startswith("blk.4.") for tensor in found.places())


@pytest.fixture
def mxfp4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A gpt-oss file as they really are: experts in MXFP4."""

    def type_of(name: str, shape: tuple[int, ...], file_type: Q) -> Q:
        expert = name.endswith("_exps.weight")
        return Q.MXFP4 if expert else usual(name, shape, file_type)

    usual = tiny_gguf.type_of
    monkeypatch.setattr(tiny_gguf, "type_of", type_of)
    return tiny_gguf.write(tmp_path / "tiny.gguf", gpt_oss.RECIPES["gpt-oss"])


def test_gpt_oss_with_mxfp4_experts_answers_as_in_llama_cpp(mxfp4: Path) -> None:
    limit = LIMITS["Q8_0"]  # Activations are rounded to 8 bits beside MXFP4 too.
    for options in ({}, {"widen": False}, {"widen": False, "native": True}):
        assert disagreement(_model(mxfp4, **options), mxfp4, PROMPT, near=limit) < limit


def test_mxfp4_stays_mxfp4(mxfp4: Path, tmp_path: Path) -> None:
    model = _model(mxfp4, widen=False, native=True)
    experts = dict(model.named_modules())["model.layers.0.mlp.experts.up_proj"]
    assert isinstance(experts, QuantizedSwitchLinear)
    assert experts.mode == "mxfp4"
    with GgufSource(mxfp4) as source:
        report = write_folder(source, tmp_path / "folder")
    assert report.forms["mxfp4"] == 3 * gpt_oss.LAYERS
    again = load_folder(str(tmp_path / "folder"))[0]
    assert np.abs(logprobs(again, PROMPT) - logprobs(_model(mxfp4), PROMPT)).max() < 0.02


def test_decays_come_out_as_they_went_in(tmp_path: Path) -> None:
    """A_log in mlx-lm's order of heads is what ssm_a was made of."""
    path = tiny_gguf.write(tmp_path / "tiny.gguf", qwen.RECIPES["qwen35, and drafting"])
    with GgufSource(path) as source:
        stored = source.values("blk.0.ssm_a")
    parameters: dict[str, mx.array] = dict(tree_flatten(_model(path).parameters()))
    loaded = np.array(parameters["language_model.model.layers.0.linear_attn.A_log"])
    # Of 2 key heads with 3 value heads each, files hold the first of both, the second, the third.
    assert np.allclose(-np.exp(loaded), stored[[0, 2, 4, 1, 3, 5]])


# --------------------------------------------------------------------------------------------------
# Refusals and damage

_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}

REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, tuple[int, ...] | None], str]] = {
    # What is wrong: recipe, changed keys, changed tensors (None: taken out), words of the message.
    "qwen2moe, stretched": ("qwen2moe", _YARN, {}, "stretches its rotary embedding"),
    "qwen3moe, stretched": ("qwen3moe", _YARN, {}, "stretches its rotary embedding"),
    "qwen3moe, partial": ("qwen3moe", {"rope.dimension_count": 32}, {}, "rotates 32 dimensions"),
    "qwen2moe, tied": ("qwen2moe", {}, {"output.weight": None}, "no output.weight"),
    "qwen3moe, no experts": ("qwen3moe", {"expert_used_count": 0}, {}, "0 of 4 experts"),
    "qwen35, two of full attention": (
        "qwen35, stretched",
        {"attention.recurrent_layers": [True, False, False, True]},
        {},
        "regular distance",
    ),
    "qwen35, no full attention": (
        "qwen35, stretched",
        {"attention.recurrent_layers": [True] * 4},
        {},
        "regular distance",
    ),
    "qwen35, interval 0": (
        "qwen35, and drafting",
        {"full_attention_interval": 0},
        {},
        "regular distance",
    ),
    "qwen35, heads do not divide": (
        "qwen35, and drafting",
        {"ssm.group_count": 4},
        {},
        "6 value heads for 4 key heads",
    ),
    "qwen35, no heads": ("qwen35, and drafting", {"ssm.group_count": 0}, {}, "for 0 key heads"),
    "qwen35, key missing": (
        "qwen35, and drafting",
        {"ssm.state_size": None},
        {},
        "no qwen35.ssm.state_size",
    ),
    "qwen35, short tensor": (
        "qwen35, and drafting",
        {},
        {"blk.0.attn_gate.weight": (512, 256)},
        "512 rows where 768",
    ),
    "qwen35, narrow tensor": (
        "qwen35, and drafting",
        {},
        {"blk.0.ssm_out.weight": (256, 512)},
        "512 columns where 768",
    ),
    "qwen3next, short tensor": (
        "qwen3next, and drafting",
        {},
        {"blk.0.ssm_ba.weight": (6, 256)},
        "6 rows where 12",
    ),
    "qwen3next, unknown tensor": (
        "qwen3next, and drafting",
        {},
        {"blk.0.ssm_d": (6,)},
        "blk.0.ssm_d, which has no place",
    ),
    "gpt-oss, another base": ("gpt-oss", {"rope.freq_base_swa": 1e4}, {}, "frequencies of their"),
    "gpt-oss, tied": ("gpt-oss", {}, {"output.weight": None}, "no output.weight"),
    "gpt-oss, all windows": (
        "gpt-oss",
        {"attention.sliding_window_pattern": [True] * 4},
        {},
        "both layers with a sliding window",
    ),
    "gpt-oss, no window": ("gpt-oss", {"attention.sliding_window": None}, {}, "sliding_window"),
    "gpt-oss, no sinks": ("gpt-oss", {}, {"blk.0.attn_sinks.weight": None}, "lacks the tensor"),
    "lfm2, window": ("lfm2", {"attention.sliding_window": 64}, {}, "has a sliding window"),
    "lfm2, embedding model": ("lfm2", {"attention.causal": False}, {}, "looks ahead"),
    "lfm2, dense layer behind": ("lfm2", {}, {"dense_2.weight": (64, 256)}, "dense_2.weight"),
    "lfm2, untied": ("lfm2", {}, {"output.weight": (600, 256)}, "holds an output.weight"),
    "lfm2, stretched": ("lfm2", _YARN, {}, "stretches its rotary embedding"),
    "lfm2, several counts": (
        "lfm2",
        {"attention.head_count_kv": [0, 4, 0, 2]},
        {},
        r"\[2, 4\] key-value heads",
    ),
    "lfm2, no attention": ("lfm2", {"attention.head_count_kv": [0] * 4}, {}, "no key-value heads"),
    "lfm2moe, softmax": ("lfm2moe", {"expert_gating_func": 1}, {}, "by a sigmoid"),
}


def _changed(
    recipe: Recipe, keys: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...] | None]
) -> Recipe:
    both = {**recipe.keys, **keys}
    shapes = {**recipe.tensors, **tensors}
    return replace(
        recipe,
        keys={key: value for key, value in both.items() if value is not None},
        tensors={name: shape for name, shape in shapes.items() if shape is not None},
    )


@pytest.mark.parametrize("what", REFUSED)
def test_what_mlx_lm_runs_otherwise_is_refused(what: str, tmp_path: Path) -> None:
    name, keys, tensors, words = REFUSED[what]
    path = tiny_gguf.write(tmp_path / "tiny.gguf", _changed(RECIPES[name], keys, tensors))
    with pytest.raises(UserError, match=words) as caught:
        _layout(path)
    assert "tiny.gguf" in str(caught.value)


def test_decays_that_grow_are_damage(tmp_path: Path) -> None:
    recipe = replace(
        qwen.RECIPES["qwen35, and drafting"],
        values=lambda name, noise: np.abs(noise) if name.endswith("ssm_a") else None,
    )
    path = tiny_gguf.write(tmp_path / "tiny.gguf", recipe)
    with pytest.raises(UserError, match="A_log are not all finite"):
        _model(path)
