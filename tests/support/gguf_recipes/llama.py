"""Tiny llama, mistral, mixtral, qwen2 and qwen3 files."""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from tests.support.tiny_gguf import VOCAB, Recipe, Shapes

WIDTH, WIDE, LAYERS, HEADS, KV_HEADS = 256, 512, 3, 8, 4


def usual_keys(**more: Any) -> dict[str, Any]:
    """Metadata of a model of `usual_tensors`; a value of None takes a key out."""
    keys = {
        "block_count": LAYERS,
        "context_length": 2048,
        "embedding_length": WIDTH,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-5,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": WIDTH // HEADS,
    }
    keys |= {key.replace("__", "."): value for key, value in more.items()}
    return {key: value for key, value in keys.items() if value is not None}


def usual_tensors(
    *,
    head: int = WIDTH // HEADS,
    tied: bool = False,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    experts: int = 0,
    expert_width: int = 256,
    layers: int = LAYERS,
) -> Shapes:
    """A pre-norm transformer with a gated feed-forward network or experts."""
    shapes: Shapes = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, WIDTH)
    for layer in range(layers):
        block: Shapes = {
            "attn_norm.weight": (WIDTH,),
            "attn_q.weight": (HEADS * head, WIDTH),
            "attn_k.weight": (KV_HEADS * head, WIDTH),
            "attn_v.weight": (KV_HEADS * head, WIDTH),
            "attn_output.weight": (WIDTH, HEADS * head),
            "ffn_norm.weight": (WIDTH,),
        }
        if qkv_bias:
            block |= {
                "attn_q.bias": (HEADS * head,),
                "attn_k.bias": (KV_HEADS * head,),
                "attn_v.bias": (KV_HEADS * head,),
            }
        if qk_norm:
            block |= {"attn_q_norm.weight": (head,), "attn_k_norm.weight": (head,)}
        if experts:
            block |= {
                "ffn_gate_inp.weight": (experts, WIDTH),
                "ffn_gate_exps.weight": (experts, expert_width, WIDTH),
                "ffn_up_exps.weight": (experts, expert_width, WIDTH),
                "ffn_down_exps.weight": (experts, WIDTH, expert_width),
            }
        else:
            block |= {
                "ffn_gate.weight": (WIDE, WIDTH),
                "ffn_up.weight": (WIDE, WIDTH),
                "ffn_down.weight": (WIDTH, WIDE),
            }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def thin(shapes: Shapes) -> Shapes:
    """The tensors of a model with heads and layers a quarter as wide, for one of many layers.

    Inside the feed-forward network it is half as wide: a row of ffn_down is a K-quant's.
    """
    return {
        name: tuple(
            size
            if axis == 0 and name in ("token_embd.weight", "output.weight")
            else size // (2 if size == WIDE else 4)
            for axis, size in enumerate(shape)
        )
        for name, shape in shapes.items()
    }


THIN = {
    "embedding_length": WIDTH // 4,
    "feed_forward_length": WIDE // 2,
    "rope.dimension_count": WIDTH // HEADS // 4,
}
"""Metadata of a thin model."""


def with_biases(shapes: Shapes, pattern: str) -> Shapes:
    """The tensors, and a bias for each matrix of a block whose name matches."""
    more = {
        name.replace(".weight", ".bias"): (shape[0],)
        for name, shape in shapes.items()
        if re.search(rf"^blk.*({pattern})\.weight$", name)
    }
    return shapes | more


def small_biases(name: str, noise: np.ndarray) -> np.ndarray | None:
    """Biases that do not drown what differs between tokens."""
    writes = re.search(r"(attn_output|ffn_down|_norm)\.bias$", name)
    return np.float32(0.03) * noise if writes else None


def llama3_table(
    name: str, noise: np.ndarray, *, context: int = 64, factor: float = 8.0
) -> np.ndarray | None:
    """rope_freqs.weight as the converter makes it, of a context so short that it shows."""
    if name != "rope_freqs.weight":
        return None
    waves = 2 * np.pi * 10000.0 ** (np.arange(len(noise)) / len(noise))
    share = np.clip((context / waves - 1.0) / (4.0 - 1.0), 0.0, 1.0)
    return np.asarray(1 / ((1 - share) / factor + share), dtype=np.float32)


RECIPES: dict[str, Recipe] = {
    "llama": Recipe("llama", usual_keys(), usual_tensors()),
    "llama, biases": Recipe(
        "llama",
        usual_keys(rope__scaling__type="none", rope__scaling__factor=4.0),
        with_biases(usual_tensors(), "attn_[qkv]|attn_output|ffn_(gate|up|down)"),
        values=small_biases,
    ),
    "llama 3": Recipe(
        "llama",
        usual_keys(),
        usual_tensors() | {"rope_freqs.weight": (WIDTH // HEADS // 2,)},
        values=llama3_table,
    ),
    "llama, linear": Recipe(
        "llama",
        usual_keys(rope__scaling__type="linear", rope__scaling__factor=4.0),
        usual_tensors(tied=True),
    ),
    "llama, linear, old key": Recipe(
        "llama", usual_keys(rope__scale_linear=3.0), usual_tensors(tied=True)
    ),
    "llama, yarn": Recipe(
        "llama",
        usual_keys(
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length=32,
            # The converter writes these, and llama.cpp does not read them for llama.
            rope__scaling__yarn_beta_fast=8.0,
            rope__scaling__yarn_beta_slow=2.0,
            rope__scaling__yarn_attn_factor=2.0,
        ),
        usual_tensors(tied=True),
        seed=2,
    ),
    "llama, yarn with a factor": Recipe(
        "llama",
        usual_keys(
            rope__scaling__type="yarn",
            rope__scaling__factor=4.0,
            rope__scaling__original_context_length=96,
            rope__scaling__attn_factor=0.8,
        ),
        usual_tensors(),
    ),
    "mistral, heads of another size": Recipe(
        "llama",
        usual_keys(attention__key_length=64, attention__value_length=64, rope__dimension_count=64),
        usual_tensors(head=64, tied=True),
    ),
    "mixtral": Recipe(
        "llama",
        usual_keys(expert_count=4, expert_used_count=2, feed_forward_length=256),
        usual_tensors(experts=4),
        seed=11,
    ),
    "qwen2": Recipe(
        "qwen2", usual_keys(rope__freq_base=1e6), usual_tensors(tied=True, qkv_bias=True)
    ),
    "qwen3": Recipe(
        "qwen3",
        usual_keys(
            rope__freq_base=1e6,
            attention__key_length=64,
            attention__value_length=64,
            rope__dimension_count=64,
        ),
        usual_tensors(head=64, tied=True, qk_norm=True),
    ),
}
