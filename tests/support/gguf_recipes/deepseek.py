"""Tiny deepseek2 files: DeepSeek V2 and V3, GLM 4.7 Flash, Youtu."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.support.tiny_gguf import VOCAB, Recipe, Shapes, usual_values

WIDTH, WIDE, HEADS = 256, 512, 4
LATENT, NOPE, ROPE, VALUE = 256, 64, 32, 64
EXPERT = 256


def deepseek2(
    layers: int = 2,
    *,
    dense: int = 1,
    q_rank: int = 256,
    apart: bool = True,
    experts: int = 4,
    shared: int = 2,
    sigmoid: bool = False,
    groups: int = 0,
    fused: bool = False,
    tied: bool = False,
    drafting: bool = False,
    seed: int = 0,
    **more: Any,
) -> Recipe:
    """A deepseek2.

    Args:
        dense: how many layers, the first ones, have no experts.
        q_rank: of the queries' latent vector; 0 for none. llama.cpp goes by the number of layers.
        apart: whether k_b and v_b are two tensors, as in newer files.
        shared: how many experts every token goes to.
        sigmoid: as in V3, with a bias for each expert.
        groups: of experts; every token's experts come from one of them.
        fused: whether gate and up projections of the experts are one tensor.
        drafting: whether there is a block more for multi-token prediction.
        more: metadata, "__" for ".".
    """
    keys: dict[str, Any] = {
        "block_count": layers + drafting,
        "context_length": 4096,
        "embedding_length": WIDTH,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": 1 if apart else HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.kv_lora_rank": LATENT,
        "attention.key_length": LATENT + ROPE if apart else NOPE + ROPE,
        "attention.value_length": LATENT if apart else VALUE,
        "rope.dimension_count": ROPE,
        "rope.freq_base": 10000.0,
        "leading_dense_block_count": dense,
        "expert_feed_forward_length": EXPERT,
        "expert_shared_count": shared,
        "vocab_size": VOCAB,
    }
    if apart:
        keys |= {
            "attention.key_length_mla": NOPE + ROPE,
            "attention.value_length_mla": VALUE,
        }
    if q_rank:
        keys["attention.q_lora_rank"] = q_rank
    if experts:
        keys |= {"expert_count": experts, "expert_used_count": 2, "expert_weights_scale": 1.5}
    if sigmoid:
        keys |= {"expert_gating_func": 2, "expert_weights_norm": True}
    if groups:
        keys |= {"expert_group_count": groups, "expert_group_used_count": 1}
    if drafting:
        keys["nextn_predict_layers"] = 1
    keys |= {key.replace("__", "."): value for key, value in more.items()}
    shapes: Shapes = {"token_embd.weight": (VOCAB, WIDTH), "output_norm.weight": (WIDTH,)}
    if not tied:
        shapes["output.weight"] = (VOCAB, WIDTH)
    for layer in range(layers + drafting):
        block: Shapes = {
            "attn_norm.weight": (WIDTH,),
            "attn_kv_a_mqa.weight": (LATENT + ROPE, WIDTH),
            "attn_kv_a_norm.weight": (LATENT,),
            "attn_output.weight": (WIDTH, HEADS * VALUE),
            "ffn_norm.weight": (WIDTH,),
        }
        if q_rank:
            block |= {
                "attn_q_a.weight": (q_rank, WIDTH),
                "attn_q_a_norm.weight": (q_rank,),
                "attn_q_b.weight": (HEADS * (NOPE + ROPE), q_rank),
            }
        else:
            block["attn_q.weight"] = (HEADS * (NOPE + ROPE), WIDTH)
        if apart:
            block |= {
                "attn_k_b.weight": (HEADS, LATENT, NOPE),
                "attn_v_b.weight": (HEADS, VALUE, LATENT),
            }
        else:
            block["attn_kv_b.weight"] = (HEADS * (NOPE + VALUE), LATENT)
        if layer < dense:
            block |= {
                "ffn_gate.weight": (WIDE, WIDTH),
                "ffn_up.weight": (WIDE, WIDTH),
                "ffn_down.weight": (WIDTH, WIDE),
            }
        else:
            block |= {
                "ffn_gate_inp.weight": (experts, WIDTH),
                "ffn_down_exps.weight": (experts, WIDTH, EXPERT),
                "ffn_gate_shexp.weight": (shared * EXPERT, WIDTH),
                "ffn_up_shexp.weight": (shared * EXPERT, WIDTH),
                "ffn_down_shexp.weight": (WIDTH, shared * EXPERT),
            }
            if fused:
                block["ffn_gate_up_exps.weight"] = (experts, 2 * EXPERT, WIDTH)
            else:
                block["ffn_gate_exps.weight"] = (experts, EXPERT, WIDTH)
                block["ffn_up_exps.weight"] = (experts, EXPERT, WIDTH)
            if sigmoid:
                block["exp_probs_b.bias"] = (experts,)
        if layer >= layers:
            block |= {
                "nextn.eh_proj.weight": (WIDTH, 2 * WIDTH),
                "nextn.enorm.weight": (WIDTH,),
                "nextn.hnorm.weight": (WIDTH,),
                "nextn.shared_head_norm.weight": (WIDTH,),
            }
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return Recipe("deepseek2", keys, shapes, values=_values(layers), seed=seed)


def _values(layers: int) -> Callable[[str, np.ndarray], np.ndarray | None]:
    def values(name: str, noise: np.ndarray) -> np.ndarray | None:
        if "attn_k_b." in name:
            # It is transposed: what it reads is not its last dimension.
            return usual_values(name, noise.swapaxes(1, 2)).swapaxes(1, 2)
        if re.search(r"attn_q(_b)?\.weight$", name):
            # Yarn makes the products of queries and keys larger.
            return usual_values(name, noise) * np.float32(0.6)
        if re.search(r"(attn_output|ffn_down\w*)\.weight$", name):
            # Many layers together write as much as a few.
            return usual_values(name, noise) * np.float32(min(1.0, 3 / layers))
        return None

    return values


def yarn(magnitude: float, factor: float = 4.0) -> dict[str, Any]:
    """Keys of a context stretched from 64 tokens, so that the test's positions show it."""
    return {
        "rope__scaling__type": "yarn",
        "rope__scaling__factor": factor,
        "rope__scaling__original_context_length": 64,
        "rope__scaling__yarn_log_multiplier": 0.1 * magnitude,
    }


RECIPES: dict[str, Recipe] = {
    "deepseek v2": deepseek2(seed=6, **yarn(0.707)),
    "deepseek v2, older": deepseek2(apart=False, **yarn(0.707)),
    "deepseek v2 lite": deepseek2(26, dense=25, q_rank=0, seed=2),
    "deepseek v3": deepseek2(sigmoid=True, experts=8, groups=4, shared=1, **yarn(1.0)),
    "deepseek v3, older": deepseek2(sigmoid=True, apart=False, fused=True, seed=8),
    "deepseek v3 with a drafting block": deepseek2(sigmoid=True, drafting=True, seed=8),
    "deepseek2, dense and tied": deepseek2(dense=2, experts=0, tied=True),
}
