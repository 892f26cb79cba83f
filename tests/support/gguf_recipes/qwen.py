"""Tiny files of Qwen's mixtures of experts and of its hybrids of linear and full attention."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.support.gguf_recipes.llama import LAYERS, WIDTH, usual_keys, usual_tensors
from tests.support.tiny_gguf import Recipe, Shapes, usual_values

EXPERTS = {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 256}
SHARED = {"expert_shared_feed_forward_length": 512}

# Two key heads, and three value heads for each of them.
KEY_HEADS, VALUE_HEADS, SIZE, HEAD = 2, 6, 128, 64
KEYS, VALUES = KEY_HEADS * SIZE, VALUE_HEADS * SIZE


def shared_expert(layers: int = LAYERS, width: int = 512) -> Shapes:
    """An expert that every token is sent to, by a gate of its own."""
    return {
        f"blk.{layer}.{name}.weight": shape
        for layer in range(layers)
        for name, shape in {
            "ffn_gate_inp_shexp": (WIDTH,),
            "ffn_gate_shexp": (width, WIDTH),
            "ffn_up_shexp": (width, WIDTH),
            "ffn_down_shexp": (WIDTH, width),
        }.items()
    }


def hybrid_keys(layers: int, **more: Any) -> dict[str, Any]:
    """Metadata of `hybrid_tensors`."""
    return usual_keys(
        block_count=layers,
        attention__key_length=HEAD,
        attention__value_length=HEAD,
        attention__layer_norm_rms_epsilon=1e-6,
        rope__freq_base=1e7,
        rope__dimension_count=HEAD // 4,
        ssm__conv_kernel=4,
        ssm__state_size=SIZE,
        ssm__group_count=KEY_HEADS,
        ssm__time_step_rank=VALUE_HEADS,
        ssm__inner_size=VALUES,
        **more,
    )


def hybrid_tensors(
    full: list[bool], linear: Shapes, *, tied: bool = False, experts: bool = False
) -> Shapes:
    """Gated delta nets, and full attention where ``full`` says so.

    Args:
        linear: the projections into a delta net, which differ.
    """
    shapes = usual_tensors(
        tied=tied, layers=len(full), experts=4 if experts else 0, head=HEAD, qk_norm=True
    )
    if experts:
        shapes |= shared_expert(len(full))
    for layer, is_full in enumerate(full):
        block = f"blk.{layer}."
        shapes[f"{block}post_attention_norm.weight"] = shapes.pop(f"{block}ffn_norm.weight")
        rows, width = shapes[f"{block}attn_q.weight"]
        # Queries and, behind each head's, its output gate.
        shapes[f"{block}attn_q.weight"] = (2 * rows, width)
        if is_full:
            continue
        for name in ("q", "k", "v", "output", "q_norm", "k_norm"):
            del shapes[f"{block}attn_{name}.weight"]
        shapes |= {
            block + name: shape
            for name, shape in {
                **linear,
                "ssm_conv1d.weight": (2 * KEYS + VALUES, 4),
                "ssm_dt.bias": (VALUE_HEADS,),
                "ssm_a": (VALUE_HEADS,),
                "ssm_norm.weight": (SIZE,),
                "ssm_out.weight": (WIDTH, VALUES),
            }.items()
        }
    return shapes


def drafting(layer: int, like: Shapes) -> Shapes:
    """A block for multi-token prediction: another of full attention, and what leads into it."""
    full = max(int(name.split(".")[1]) for name in like if name.endswith("attn_q.weight"))
    block = f"blk.{full}."
    copied: Shapes = {name.replace(block, f"blk.{layer}."): shape
              for name, shape in like.items() if name.startswith(block)}  # fmt: skip
    return copied | {
        f"blk.{layer}.nextn.{name}.weight": shape
        for name, shape in {
            "eh_proj": (WIDTH, 2 * WIDTH),
            "enorm": (WIDTH,),
            "hnorm": (WIDTH,),
            "shared_head_norm": (WIDTH,),
        }.items()
    }


_MIXED: Shapes = {
    "attn_qkv.weight": (2 * KEYS + VALUES, WIDTH),
    "attn_gate.weight": (VALUES, WIDTH),
}
NEXT: Shapes = {**_MIXED, "ssm_ba.weight": (2 * VALUE_HEADS, WIDTH)}
OLD_NEXT: Shapes = {
    "ssm_in.weight": (2 * KEYS + 2 * VALUES, WIDTH),
    "ssm_ba.weight": NEXT["ssm_ba.weight"],
}
LATER: Shapes = {
    **_MIXED,
    "ssm_alpha.weight": (VALUE_HEADS, WIDTH),
    "ssm_beta.weight": (VALUE_HEADS, WIDTH),
}


def quiet(name: str, noise: np.ndarray) -> np.ndarray | None:
    """Layers that change the stream less than those of `usual_values`.

    They round more often in llama.cpp than a llama's do, and send some tokens to other experts.
    """
    if re.search(r"(attn_output|ffn_down(_exps|_shexp)?|ssm_out|out_proj)\.weight$", name):
        share = 0.25 if "ssm_out" in name else 0.5
        return np.float32(share) * usual_values(name, noise)
    return None


def values(name: str, noise: np.ndarray) -> np.ndarray | None:
    """Decays of all speeds, kernels that look back, gates that are neither open nor shut."""
    if name.endswith("ssm_a"):
        return -np.exp(noise)
    if name.endswith("ssm_dt.bias"):
        return noise - 1
    if name.endswith("ssm_conv1d.weight"):
        return np.float32(0.5) * noise
    if name.endswith("ffn_gate_inp_shexp.weight"):
        return noise / np.float32(np.sqrt(noise.shape[-1]))
    return quiet(name, noise)


def fused(shapes: Shapes) -> Shapes:
    """Gates and ups of the experts in one tensor, as newer converters can write them."""
    joined = {}
    for name, shape in shapes.items():
        if "ffn_up_exps" in name:
            continue
        if "ffn_gate_exps" in name:
            experts, out, width = shape
            name, shape = name.replace("gate", "gate_up"), (experts, 2 * out, width)
        joined[name] = shape
    return joined


SECTIONS = {"rope__dimension_sections": [3, 3, 2, 0]}

FOURTH = [False, False, False, True]
SECOND = [False, True, False, True]
_NEXT = hybrid_tensors(SECOND, NEXT, experts=True)
_DENSE = hybrid_tensors(FOURTH, LATER, tied=True)
_MOE = hybrid_tensors(SECOND, LATER, experts=True)

RECIPES: dict[str, Recipe] = {
    "qwen2moe": Recipe(
        "qwen2moe",
        usual_keys(rope__freq_base=1e6, **EXPERTS, **SHARED),
        usual_tensors(experts=4, qkv_bias=True) | shared_expert(),
        values,
        seed=1,
    ),
    "qwen3moe": Recipe(
        "qwen3moe",
        usual_keys(
            rope__freq_base=1e6,
            attention__key_length=HEAD,
            attention__value_length=HEAD,
            rope__dimension_count=HEAD,
            **EXPERTS,
        ),
        usual_tensors(experts=4, head=HEAD, qk_norm=True, tied=True),
        quiet,
    ),
    "qwen3next, and drafting": Recipe(
        "qwen3next",
        hybrid_keys(
            5,
            full_attention_interval=2,
            attention__recurrent_layers=[True, False, True, False, False],
            nextn_predict_layers=1,
            **EXPERTS,
            **SHARED,
        ),
        _NEXT | drafting(4, _NEXT),
        values,
        seed=4,
    ),
    "qwen35, and drafting": Recipe(
        "qwen35",
        hybrid_keys(5, full_attention_interval=4, nextn_predict_layers=1, **SECTIONS),
        _DENSE | drafting(4, _DENSE),
        values,
    ),
    "qwen35, stretched": Recipe(
        "qwen35",
        hybrid_keys(
            4,
            attention__recurrent_layers=[not full for full in SECOND],
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length=64,
            **SECTIONS,
        ),
        hybrid_tensors(SECOND, LATER),
        values,
        seed=1,
    ),
    "qwen35moe": Recipe(
        "qwen35moe",
        hybrid_keys(4, full_attention_interval=2, **SECTIONS, **EXPERTS, **SHARED),
        _MOE,
        values,
        seed=10,
    ),
}

VARIANTS: dict[str, Recipe] = {
    "qwen3next, first files": Recipe(
        "qwen3next",
        hybrid_keys(4, **EXPERTS, **SHARED),
        hybrid_tensors(FOURTH, OLD_NEXT, experts=True, tied=True),
        values,
    ),
    "qwen35moe, gates and ups fused": Recipe(
        "qwen35moe",
        hybrid_keys(4, full_attention_interval=2, **SECTIONS, **EXPERTS, **SHARED),
        fused(_MOE),
        values,
    ),
}
"""Other layouts of the same models, for a test of their own."""
