"""Llama's relatives from GGUF: rotary embeddings, fused parts, writers, refusals."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from mlx.utils import tree_flatten

from convert.architectures import gguf_writers
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx import Layout, layout, load
from tests.support import tiny_gguf
from tests.support.gguf_recipes import cohere, dense, granite, llama
from tests.support.gguf_recipes.llama import HEADS, WIDTH, llama3_table
from tests.support.tiny_gguf import Recipe

RECIPES = {**llama.RECIPES, **granite.RECIPES, **cohere.RECIPES, **dense.RECIPES}

Shape = tuple[int, ...]


def _changed(
    recipe: Recipe, keys: Mapping[str, Any], tensors: Mapping[str, Shape | None]
) -> Recipe:
    """The recipe with other keys and tensors; None takes one out."""
    both = {**recipe.keys, **keys}
    shapes = {**recipe.tensors, **tensors}
    return replace(
        recipe,
        keys={key: value for key, value in both.items() if value is not None},
        tensors={name: shape for name, shape in shapes.items() if shape is not None},
    )


def _layout(folder: Path, recipe: Recipe) -> Layout:
    with GgufSource(tiny_gguf.write(folder / "tiny.gguf", recipe)) as source:
        return layout(source)


@pytest.mark.parametrize("name", RECIPES)
def test_every_writer_is_one_parameter(name: str, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    found = _layout(tmp_path, recipe)
    places = found.places()
    metadata = {f"{recipe.architecture}.{key}": value for key, value in recipe.keys.items()}
    for writer in gguf_writers.find(recipe.architecture, recipe.tensors, metadata):
        for tensor in (*writer.parameters, *writer.gains):
            (parameter,) = places[tensor]
            weight = found.weights[parameter]
            assert len(weight.pieces) == 1
            assert weight.pieces[0].rows is None
            assert weight.change is None


# --------------------------------------------------------------------------------------------------
# Rotary embeddings


@pytest.mark.parametrize(
    ("context", "factor"), [(64, 8.0), (256, 32.0), (8192, 8.0), (32768, 2.0), (25, 4.0), (16, 3.0)]
)
def test_a_table_of_factors_becomes_llama_3s_parameters(
    context: int, factor: float, tmp_path: Path
) -> None:
    """Whatever the original context was: only its ratio to the limits shows in the table."""
    table = partial(llama3_table, context=context, factor=factor)
    config = _layout(tmp_path, replace(RECIPES["llama 3"], values=table)).config
    scaling = config["rope_scaling"]
    assert scaling["rope_type"] == scaling["type"] == "llama3"
    waves = 2 * np.pi * 10000.0 ** (np.arange(16) / 16)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip(
        (scaling["original_max_position_embeddings"] / waves - low) / (high - low), 0, 1
    )
    expected = table("rope_freqs.weight", np.zeros(16))
    assert expected is not None
    assert np.allclose(1 / ((1 - share) / scaling["factor"] + share), expected, rtol=1e-3)


def test_a_table_of_ones_is_none(tmp_path: Path) -> None:
    recipe = replace(
        RECIPES["llama 3"],
        values=lambda name, noise: np.ones_like(noise) if name == "rope_freqs.weight" else None,
    )
    assert _layout(tmp_path, recipe).config["rope_scaling"] is None


@pytest.mark.parametrize("damage", ["zero", "not a number", "noise", "falling"])
def test_another_table_is_refused(damage: str, tmp_path: Path) -> None:
    def values(name: str, noise: np.ndarray) -> np.ndarray | None:
        if name != "rope_freqs.weight":
            return None
        table = np.linspace(1, 8, len(noise), dtype=np.float32)
        if damage == "noise":
            return table + noise
        if damage == "falling":
            return table[::-1]
        table[3] = 0 if damage == "zero" else np.nan
        return table

    with pytest.raises(UserError, match="no table of llama3's kind"):
        _layout(tmp_path, replace(RECIPES["llama 3"], values=values))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.factor": 2.0}, {"type": "linear", "factor": 2.0}),
        ({"rope.scale_linear": 2.0}, {"type": "linear", "factor": 2.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
            {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 2048},
        ),
    ],
)
def test_stretching_is_read_as_llama_cpp_reads_it(
    keys: dict[str, Any], expected: dict[str, Any] | None, tmp_path: Path
) -> None:
    scaling = _layout(tmp_path, _changed(RECIPES["llama"], keys, {})).config["rope_scaling"]
    if expected is None:
        assert scaling is None
    else:
        assert scaling == expected | {"rope_type": expected["type"]}


def test_a_share_of_a_head_is_exact(tmp_path: Path) -> None:
    """int(head * share), which mlx-lm takes, is the file's number for every head."""
    recipe = RECIPES["glm4, biases, heads of another size"]
    for rotated in range(2, 65, 2):
        changed = _changed(recipe, {"rope.dimension_count": rotated}, {})
        assert int(64 * _layout(tmp_path, changed).config["partial_rotary_factor"]) == rotated


# --------------------------------------------------------------------------------------------------
# Parts put together and taken apart


def test_a_shared_experts_halves_stay_quantized_in_one_matrix(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", RECIPES["granitemoe, shared expert"], Q.Q4_K)
    with GgufSource(path) as source:
        model = load(source, native=True, widen=False).model
        halves = [source.values(f"blk.1.ffn_{half}_shexp.weight") for half in ("gate", "up")]
        modules = dict(model.named_modules())
        module = modules["model.layers.1.shared_mlp.input_linear"]
        assert type(module).__name__ == "QuantizedLinear"
        whole = dict(tree_flatten(load(source, widen=True).model.parameters()))
    matrix = np.array(whole["model.layers.1.shared_mlp.input_linear.weight"])
    assert np.array_equal(matrix, np.concatenate(halves))


def test_nemotrons_norms_hold_one_less(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", RECIPES["nemotron"])
    with GgufSource(path) as source:
        parameters = dict(tree_flatten(load(source).model.parameters()))
        for tensor, parameter in {
            "output_norm.weight": "model.norm.weight",
            "blk.2.ffn_norm.weight": "model.layers.2.post_attention_layernorm.weight",
        }.items():
            stored = source.values(tensor)
            assert np.allclose(np.array(parameters[parameter]), stored - 1, atol=1e-6)
        bias = np.array(parameters["model.norm.bias"])
        assert np.array_equal(bias, source.values("output_norm.bias"))


def test_exaone4_has_windows_where_llama_cpp_slides_them(tmp_path: Path) -> None:
    config = _layout(tmp_path, RECIPES["exaone4"]).config
    assert config["sliding_window"] is None
    assert config["sliding_window_pattern"] is None
    config = _layout(tmp_path, RECIPES["exaone4, windows"]).config
    assert config["sliding_window"] == 16
    assert config["sliding_window_pattern"] == "LLLG" * 16


def test_drafting_blocks_have_no_place(tmp_path: Path) -> None:
    recipe = RECIPES["glm4"]
    more: dict[str, Shape | None] = {
        name.replace("blk.2.", "blk.3."): shape
        for name, shape in recipe.tensors.items()
        if name.startswith("blk.2.")
    }
    more["blk.3.nextn.eh_proj.weight"] = (WIDTH, 2 * WIDTH)
    changed = _changed(recipe, {"block_count": 4, "nextn_predict_layers": 1}, more)
    found = _layout(tmp_path, changed)
    assert found.config["num_hidden_layers"] == 3
    assert not any(tensor.startswith("blk.3.") for tensor in found.places())


def test_a_router_corrected_alike_for_all_experts_is_none(tmp_path: Path) -> None:
    recipe = RECIPES["ernie4_5-moe"]
    assert "blk.1.exp_probs_b.bias" not in _layout(tmp_path, recipe).places()
    with pytest.raises(UserError, match=r"choice by blk\.1\.exp_probs_b\.bias"):
        _layout(tmp_path, replace(recipe, values=None))


# --------------------------------------------------------------------------------------------------
# Refusals and damage

_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
_LONG = {"rope.scaling.type": "longrope"}
_TABLE: dict[str, Shape | None] = {"rope_freqs.weight": (WIDTH // HEADS // 2,)}
_BIAS: dict[str, Shape | None] = {"blk.0.attn_output.bias": (WIDTH,)}
_HALF = {"rope.dimension_count": WIDTH // HEADS // 2}

REFUSED: dict[str, tuple[str, dict[str, Any], dict[str, Shape | None], str]] = {
    # What is wrong: recipe, changed keys, changed tensors (None: taken out), words of the message.
    "longrope": ("llama", _LONG, {}, "by the method 'longrope'"),
    "twice": ("llama 3", _YARN, {}, "stretches its rotary embedding twice"),
    "factor without yarn": ("llama", {"rope.scaling.attn_factor": 1.2}, {}, "embedding by 1.2"),
    "short table": ("llama 3", {}, {"rope_freqs.weight": (8,)}, "no table of llama3's kind"),
    "partial": ("llama", _HALF, {}, "rotates 16 dimensions"),
    "odd": ("llama", {"rope.dimension_count": 7}, {}, "rotates 7 of the 32"),
    "no heads": ("llama", {"attention.head_count": 0}, {}, "head_count = 0"),
    "no key heads": ("llama", {"attention.head_count_kv": 0}, {}, "head_count_kv = 0"),
    "heads that do not divide": (
        "llama",
        {"attention.head_count": 24, "rope.dimension_count": None},
        {},
        "not those of 24 heads",
    ),
    "no base": ("llama", {"rope.freq_base": 0.0}, {}, "rope.freq_base = 0"),
    "not a number": (
        "llama",
        {"rope.freq_base": float("nan")},
        {},
        "rope.freq_base must be a finite number",
    ),
    "half a layer": ("llama", {"block_count": 2.5}, {}, "block_count must be a whole number"),
    "no inner width": ("llama", {"feed_forward_length": 0}, {}, "cannot make a model"),
    "one bias only": ("llama", {}, _BIAS, "no model.layers.0.self_attn.o_proj.bias"),
    "mixtral, stretched": ("mixtral", _YARN, {}, "stretches its rotary embedding"),
    "mixtral, table": ("mixtral", {}, _TABLE, "stretches its rotary embedding"),
    "mixtral, no experts": ("mixtral", {"expert_used_count": 0}, {}, "expert_used_count = 0"),
    "mixtral, too many experts": ("mixtral", {"expert_used_count": 5}, {}, "5 of 4 experts"),
    "granite, no rotation": ("granite", {"rope.scaling.finetuned": False}, {}, "no rotary"),
    "granite, no scale": ("granite", {"logit_scale": None}, {}, "no granite.logit_scale"),
    "granitemoe, stretched": (
        "granitemoe, shared expert",
        {"rope.scaling.factor": 2.0},
        {},
        "stretches its rotary embedding",
    ),
    "granitemoe, no shared width": (
        "granitemoe, shared expert",
        {"expert_shared_feed_forward_length": None},
        {},
        "no granitemoe.expert_shared_feed_forward_length",
    ),
    "granitemoe, half a shared expert": (
        "granitemoe, shared expert",
        {},
        {"blk.1.ffn_up_shexp.weight": None},
        "blk.1.ffn_up_shexp.weight",
    ),
    "command-r, stretched": (
        "command-r",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        {},
        "stretches its rotary embedding",
    ),
    "command-r, partial": ("command-r", _HALF, {}, "rotates 16 dimensions"),
    "command-r, epsilon": (
        "command-r",
        {"attention.layer_norm_epsilon": None},
        {},
        "no command-r.attention.layer_norm_epsilon",
    ),
    "command-r, head": ("command-r", {}, {"output.weight": (512, WIDTH)}, "no lm_head.weight"),
    "cohere2, biases": ("cohere2", {}, _BIAS, "no model.layers.0.self_attn.o_proj.bias"),
    "cohere2, uneven": (
        "cohere2, another pattern",
        {"attention.sliding_window_pattern": [True, False, True, True]},
        {},
        "all but every n-th",
    ),
    "cohere2, all windows": (
        "cohere2, another pattern",
        {"attention.sliding_window_pattern": [True] * 4},
        {},
        "all but every n-th",
    ),
    "cohere2, no windows": (
        "cohere2",
        {"attention.sliding_window_pattern": 1},
        {},
        "all but every n-th",
    ),
    "cohere2, a word for a pattern": (
        "cohere2",
        {"attention.sliding_window_pattern": "LLLG"},
        {},
        "one number is expected",
    ),
    "cohere2, short pattern": (
        "cohere2",
        {"attention.sliding_window_pattern": [True, False]},
        {},
        "2 values of cohere2.attention.sliding_window_pattern for 5 layers",
    ),
    "cohere2, empty window": ("cohere2", {"attention.sliding_window": 0}, {}, "window = 0"),
    "cohere2, no window": (
        "cohere2",
        {"attention.sliding_window": None},
        {},
        "no cohere2.attention.sliding_window",
    ),
    "glm4, tied": ("glm4", {}, {"output.weight": None}, "no output.weight"),
    "glm4, stretched": ("glm4", _YARN, {}, "stretches its rotary embedding"),
    "glm4, no rotation": ("glm4", {"rope.dimension_count": 0}, {}, "rotates 0 of the 32"),
    "starcoder2, stretched": ("starcoder2", _YARN, {}, "stretches its rotary embedding"),
    "starcoder2, a bias less": (
        "starcoder2",
        {},
        {"blk.1.ffn_up.bias": None},
        "lacks the tensor for model.layers.1.mlp.c_fc.bias",
    ),
    "exaone4, all windows": (
        "exaone4, windows",
        {"attention.sliding_window_pattern": 0},
        {},
        "not both layers with and layers without",
    ),
    "olmo3, all windows": (
        "olmo3",
        {"attention.sliding_window_pattern": [True] * 4},
        {},
        "not both layers with and layers without",
    ),
    "olmo2, a norm less": (
        "olmo2",
        {},
        {"blk.0.post_ffw_norm.weight": None},
        "lacks the tensor for model.layers.0.post_feedforward_layernorm.weight",
    ),
    "nemotron, yarn": ("nemotron", _YARN, {}, "knows linear only"),
    "nemotron, no epsilon": (
        "nemotron",
        {"attention.layer_norm_epsilon": None},
        {},
        "no nemotron.attention.layer_norm_epsilon",
    ),
    "ernie4_5, biases": ("ernie4_5", {}, _BIAS, "no model.layers.0.self_attn.o_proj.bias"),
    "ernie4_5, stretched": ("ernie4_5", _YARN, {}, "stretches its rotary embedding"),
    "ernie4_5-moe, every second": (
        "ernie4_5-moe",
        {"interleave_moe_layer_step": 2},
        {},
        "every n-th layer only",
    ),
    "seed_oss, partial": ("seed_oss", {"rope.dimension_count": 32}, {}, "rotates 32 dimensions"),
    "hunyuan-dense, alpha": (
        "hunyuan-dense",
        {"rope.scaling.alpha": 50.0},
        {},
        "alpha besides the base",
    ),
    "hunyuan-dense, stretched": (
        "hunyuan-dense",
        {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0},
        {},
        "stretches its rotary embedding",
    ),
    "ernie4_5-moe, no width": (
        "ernie4_5-moe",
        {"expert_feed_forward_length": 0},
        {},
        "expert_feed_forward_length = 0",
    ),
    "mistral3, both": (
        "ministral3",
        {"rope.scaling.attn_factor": 0.9},
        {},
        "two factors of its rotary embedding",
    ),
    "ministral3, table": (
        "ministral3",
        {"rope.scaling.type": "none"},
        _TABLE,
        "by a table",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_mlx_lm_runs_otherwise_is_refused(what: str, tmp_path: Path) -> None:
    name, keys, tensors, words = REFUSED[what]
    recipe = _changed(RECIPES[name], keys, tensors)
    if "table" in what and "short" not in what:
        recipe = replace(recipe, values=llama3_table)
    with pytest.raises(UserError, match=words) as caught:
        _layout(tmp_path, recipe)
    assert "tiny.gguf" in str(caught.value)
