"""Tiny files of llama's dense relatives."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.support.gguf_recipes.llama import (
    HEADS,
    KV_HEADS,
    LAYERS,
    THIN,
    WIDE,
    WIDTH,
    llama3_table,
    small_biases,
    thin,
    usual_keys,
    usual_tensors,
    with_biases,
)
from tests.support.tiny_gguf import Recipe, Shapes

HEAD = WIDTH // HEADS
LAYER_NORM: dict[str, Any] = {
    "attention.layer_norm_rms_epsilon": None,
    "attention.layer_norm_epsilon": 1e-5,
}


def _keys(**more: Any) -> dict[str, Any]:
    return usual_keys(**more)


def _renamed(shapes: Shapes, names: dict[str, str]) -> Shapes:
    """The tensors, those of a block under other names; an empty one takes them out."""
    found: Shapes = {}
    for name, shape in shapes.items():
        block = re.fullmatch(r"(blk\.\d+\.)(.+)(\.\w+)", name)
        stem = names.get(block[2], block[2]) if block else name
        if stem:
            found[f"{block[1]}{stem}{block[3]}" if block else name] = shape
    return found


def _post_norms(shapes: Shapes, *, before: bool = False) -> Shapes:
    """The tensors with norms behind each half of a layer, and also or only there."""
    found = shapes if before else _renamed(shapes, {"attn_norm": "", "ffn_norm": ""})
    width = shapes["output_norm.weight"]
    layers = sum(name.endswith("attn_q.weight") for name in shapes)
    return found | {
        f"blk.{layer}.{norm}.weight": width
        for layer in range(layers)
        for norm in ("post_attention_norm", "post_ffw_norm")
    }


def _full_qk_norms() -> Shapes:
    return {
        f"blk.{layer}.attn_{which}_norm.weight": (heads * HEAD,)
        for layer in range(4)
        for which, heads in (("q", HEADS), ("k", KV_HEADS))
    }


def _glm4(**more: Any) -> Shapes:
    shapes = _renamed(usual_tensors(**more), {"ffn_gate": ""})
    shapes = {
        name: (2 * WIDE, WIDTH) if "ffn_up" in name else shape for name, shape in shapes.items()
    }
    return _post_norms(shapes, before=True)


def _layer_norms(shapes: Shapes) -> Shapes:
    return with_biases(shapes, "attn_norm|ffn_norm") | {"output_norm.bias": (WIDTH,)}


def _ungated(**more: Any) -> Shapes:
    return _layer_norms(_renamed(usual_tensors(**more), {"ffn_gate": ""}))


def _ernie_moe(*, shared: int, dense: int) -> Shapes:
    shapes = {
        name: shape
        for name, shape in usual_tensors(tied=True, experts=4).items()
        if not re.match(rf"blk\.[0-{dense - 1}]\.ffn_\w+(_exps|_inp)\.", name)
    }
    plain = usual_tensors(tied=True, layers=dense)
    shapes |= {name: shape for name, shape in plain.items() if re.search(r"ffn_\w+\.", name)}
    for layer in range(dense, LAYERS):
        shapes[f"blk.{layer}.exp_probs_b.bias"] = (4,)
        shapes |= {
            f"blk.{layer}.ffn_gate_shexp.weight": (shared, WIDTH),
            f"blk.{layer}.ffn_up_shexp.weight": (shared, WIDTH),
            f"blk.{layer}.ffn_down_shexp.weight": (WIDTH, shared),
        }
    return shapes


def _no_correction(name: str, noise: np.ndarray) -> np.ndarray | None:
    return np.full_like(noise, 0.25) if "exp_probs_b" in name else None


def _softer(name: str, noise: np.ndarray) -> np.ndarray | None:
    """Logits half as far apart, because rounding adds up over many layers."""
    return np.float32(0.3 / np.sqrt(noise.shape[-1])) * noise if name == "output.weight" else None


_YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 16,
}

_EXAONE_32B = 64
"""llama.cpp slides windows in an exaone4 of so many layers only."""

RECIPES: dict[str, Recipe] = {
    "glm4": Recipe(
        "glm4",
        _keys(rope__dimension_count=HEAD // 2),
        _glm4(),
        seed=3,
    ),
    "glm4, biases, heads of another size": Recipe(
        "glm4",
        _keys(rope__dimension_count=24, attention__key_length=64, attention__value_length=64),
        _glm4(head=64, qkv_bias=True),
    ),
    "glm4, of a model that sees": Recipe(
        "glm4",
        _keys(rope__dimension_count=HEAD // 2, rope__dimension_sections=[2, 3, 3, 0]),
        _glm4(),
        seed=7,
    ),
    "starcoder2": Recipe(
        "starcoder2",
        _keys(**LAYER_NORM, rope__freq_base=1e5),
        with_biases(_ungated(tied=True), "attn_[qkv]|attn_output|ffn_(up|down)"),
        values=small_biases,
    ),
    "smollm3": Recipe(
        "smollm3",
        _keys(block_count=5),
        usual_tensors(tied=True, layers=5),
        seed=6,
    ),
    "smollm3, yarn": Recipe(
        "smollm3",
        _keys(**_YARN, block_count=4),
        usual_tensors(tied=True, layers=4),
        seed=4,
    ),
    "exaone4": Recipe(
        "exaone4",
        # A key that llama.cpp does not follow in a model of this size.
        _keys(attention__sliding_window=8),
        _post_norms(usual_tensors(tied=True, qk_norm=True)) | {"rope_freqs.weight": (HEAD // 2,)},
        values=llama3_table,
    ),
    "exaone4, windows": Recipe(
        "exaone4",
        _keys(**THIN, block_count=_EXAONE_32B, attention__sliding_window=16),
        _post_norms(thin(usual_tensors(qk_norm=True, layers=_EXAONE_32B))),
        values=_softer,
        seed=3,
    ),
    "olmo2": Recipe(
        "olmo2",
        _keys(),
        _post_norms(usual_tensors())
        | {name: shape for name, shape in _full_qk_norms().items() if "blk.3" not in name},
    ),
    "olmo3": Recipe(
        "olmo2",
        _keys(
            **_YARN,
            block_count=4,
            attention__sliding_window=12,
            attention__sliding_window_pattern=[True, True, False, True],
        ),
        _post_norms(usual_tensors(layers=4)) | _full_qk_norms(),
    ),
    "nemotron": Recipe(
        "nemotron",
        _keys(**LAYER_NORM, rope__dimension_count=HEAD // 2, rope__scaling__type="none"),
        _ungated(),
        values=small_biases,
    ),
    "nemotron, biases, linear": Recipe(
        "nemotron",
        _keys(
            **LAYER_NORM,
            rope__dimension_count=HEAD // 4,
            rope__scaling__type="linear",
            rope__scaling__factor=4.0,
        ),
        with_biases(_ungated(), "attn_[qkv]|attn_output|ffn_(up|down)"),
        values=small_biases,
    ),
    "ernie4_5": Recipe(
        "ernie4_5",
        _keys(),
        usual_tensors(tied=True),
        seed=4,
    ),
    "ernie4_5, heads of another size": Recipe(
        "ernie4_5",
        _keys(attention__key_length=64, attention__value_length=64, rope__dimension_count=64),
        usual_tensors(head=64),
        seed=5,
    ),
    "ernie4_5-moe": Recipe(
        "ernie4_5-moe",
        _keys(
            expert_count=4,
            expert_used_count=2,
            interleave_moe_layer_step=1,
            leading_dense_block_count=1,
            expert_feed_forward_length=256,
            expert_shared_count=2,
            expert_shared_feed_forward_length=512,
        ),
        _ernie_moe(shared=512, dense=1),
        values=_no_correction,
        seed=1,
    ),
    "seed_oss": Recipe(
        "seed_oss",
        _keys(attention__key_length=64, attention__value_length=64, rope__dimension_count=64),
        _renamed(usual_tensors(head=64, qkv_bias=True), {"ffn_norm": "post_attention_norm"}),
        seed=6,
    ),
    "hunyuan-dense": Recipe(
        "hunyuan-dense",
        _keys(
            rope__freq_base=11158839.0,
            rope__scaling__type="none",
            rope__scaling__factor=1.0,
            rope__scaling__original_context_length=262144,
        ),
        usual_tensors(tied=True, qk_norm=True),
    ),
    "mistral3": Recipe("mistral3", _keys(), usual_tensors()),
    "ministral3": Recipe(
        "mistral3",
        _keys(
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length=32,
            attention__temperature_scale=0.1,
            rope__scaling__yarn_beta_fast=2.0,
            rope__scaling__yarn_beta_slow=1.0,
            rope__scaling__yarn_log_multiplier=1.0,
        ),
        usual_tensors(tied=True),
    ),
}
