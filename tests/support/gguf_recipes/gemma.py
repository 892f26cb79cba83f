"""Tiny gemma, gemma2, gemma3 and gemma4 files."""

from __future__ import annotations

from typing import Any

import numpy as np

from tests.support.tiny_gguf import VOCAB, Recipe, Shapes

WIDE, HEADS, KV_HEADS, HEAD = 512, 4, 2, 64
WINDOW = 16

POST_NORMS = ("post_attention_norm", "post_ffw_norm")


def usual_keys(layers: int = 3, width: int = 256, **more: Any) -> dict[str, Any]:
    """Metadata of a model of `usual_tensors`; a value of None takes a key out."""
    keys = {
        "block_count": layers,
        "context_length": 8192,
        "embedding_length": width,
        "feed_forward_length": WIDE,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.layer_norm_rms_epsilon": 1e-6,
        "attention.key_length": HEAD,
        "attention.value_length": HEAD,
    }
    keys |= {key.replace("__", "."): value for key, value in more.items()}
    return {key: value for key, value in keys.items() if value is not None}


def usual_tensors(
    layers: int = 3,
    width: int = 256,
    *,
    post_norms: bool = False,
    qk_norm: bool = False,
    untied: bool = False,
) -> Shapes:
    """Of Gemma 1 to 3."""
    shapes: Shapes = {"token_embd.weight": (VOCAB, width), "output_norm.weight": (width,)}
    if untied:
        shapes["output.weight"] = (VOCAB, width)
    for layer in range(layers):
        block: Shapes = {
            "attn_norm.weight": (width,),
            "attn_q.weight": (HEADS * HEAD, width),
            "attn_k.weight": (KV_HEADS * HEAD, width),
            "attn_v.weight": (KV_HEADS * HEAD, width),
            "attn_output.weight": (width, HEADS * HEAD),
            "ffn_norm.weight": (width,),
            "ffn_gate.weight": (WIDE, width),
            "ffn_up.weight": (WIDE, width),
            "ffn_down.weight": (width, WIDE),
        }
        if post_norms:
            block |= {f"{name}.weight": (width,) for name in POST_NORMS}
        if qk_norm:
            block |= {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return shapes


def _gemma3(
    layers: int = 7, width: int = 256, untied: bool = False, seed: int = 0, **more: Any
) -> Recipe:
    keys = {
        "rope__freq_base": 1e6,
        "attention__sliding_window": WINDOW,
        "context_length": 32768,
        **more,
    }
    return Recipe(
        "gemma3",
        usual_keys(layers, width, **keys),
        usual_tensors(layers, width, post_norms=True, qk_norm=True, untied=untied),
        seed=seed,
    )


# --------------------------------------------------------------------------------------------------
# Gemma 4

GLOBAL_HEAD, PER_LAYER = 128, 256


def gemma4(
    sliding: list[bool],
    *,
    shared: int = 0,
    per_layer: int = 0,
    doubled: bool = False,
    keys_are_values: bool = False,
    experts: int = 0,
    fused: bool = True,
    seed: int = 0,
    **more: Any,
) -> Recipe:
    """A Gemma 4.

    Args:
        sliding: which layers are.
        shared: how many layers, the last ones, use keys and values of others.
        per_layer: width of the per-layer inputs.
        doubled: whether shared layers have a feed-forward network twice as wide.
        keys_are_values: full layers have no attn_v, and one key head.
        experts: how many, beside the dense network.
        fused: whether gate and up projections of the experts are one tensor.
    """
    layers, width = len(sliding), 256
    widths = [WIDE * (2 if doubled and n >= layers - shared else 1) for n in range(layers)]
    kv_heads = [KV_HEADS if slides or not keys_are_values else 1 for slides in sliding]
    keys = usual_keys(
        layers,
        width,
        context_length=131072,
        feed_forward_length=widths if doubled else WIDE,
        attention__head_count_kv=kv_heads if keys_are_values else KV_HEADS,
        attention__key_length=GLOBAL_HEAD,
        attention__value_length=GLOBAL_HEAD,
        attention__key_length_swa=HEAD,
        attention__value_length_swa=HEAD,
        attention__sliding_window=WINDOW,
        attention__sliding_window_pattern=sliding,
        attention__shared_kv_layers=shared,
        embedding_length_per_layer_input=per_layer,
        final_logit_softcapping=3.0,
        rope__freq_base=1e6,
        rope__freq_base_swa=10000.0,
        rope__dimension_count=GLOBAL_HEAD,
        rope__dimension_count_swa=HEAD,
        **more,
    )
    if experts:
        keys |= {"expert_count": experts, "expert_used_count": 2}
        keys |= {"expert_feed_forward_length": 256}
    shapes: Shapes = {
        "token_embd.weight": (VOCAB, width),
        "output_norm.weight": (width,),
        "rope_freqs.weight": (GLOBAL_HEAD // 2,),
    }
    if per_layer:
        shapes |= {
            "per_layer_token_embd.weight": (VOCAB, per_layer * layers),
            "per_layer_model_proj.weight": (per_layer * layers, width),
            "per_layer_proj_norm.weight": (per_layer,),
        }
    for layer, slides in enumerate(sliding):
        head = HEAD if slides else GLOBAL_HEAD
        block: Shapes = {
            "attn_norm.weight": (width,),
            "attn_q.weight": (HEADS * head, width),
            "attn_q_norm.weight": (head,),
            # Published files hold these of the sharing layers as well, unused.
            "attn_k.weight": (kv_heads[layer] * head, width),
            "attn_k_norm.weight": (head,),
            "attn_output.weight": (width, HEADS * head),
            "post_attention_norm.weight": (width,),
            "ffn_norm.weight": (width,),
            "ffn_gate.weight": (widths[layer], width),
            "ffn_up.weight": (widths[layer], width),
            "ffn_down.weight": (width, widths[layer]),
            "post_ffw_norm.weight": (width,),
            "layer_output_scale.weight": (1,),
        }
        if slides or not keys_are_values:
            block["attn_v.weight"] = (kv_heads[layer] * head, width)
        if per_layer:
            block |= {
                "inp_gate.weight": (per_layer, width),
                "proj.weight": (width, per_layer),
                "post_norm.weight": (width,),
            }
        if experts:
            block |= {
                "ffn_gate_inp.weight": (experts, width),
                "ffn_gate_inp.scale": (width,),
                "ffn_down_exps.weight": (experts, width, 256),
                "ffn_down_exps.scale": (experts,),
                "post_ffw_norm_1.weight": (width,),
                "pre_ffw_norm_2.weight": (width,),
                "post_ffw_norm_2.weight": (width,),
            }
            if fused:
                block["ffn_gate_up_exps.weight"] = (experts, 512, width)
            else:
                block["ffn_gate_exps.weight"] = (experts, 256, width)
                block["ffn_up_exps.weight"] = (experts, 256, width)
        shapes |= {f"blk.{layer}.{name}": shape for name, shape in block.items()}
    return Recipe("gemma4", keys, shapes, values=_gemma4_values, seed=seed)


def _gemma4_values(name: str, noise: np.ndarray) -> np.ndarray | None:
    if name == "rope_freqs.weight":
        turning = len(noise) // 4
        return np.array([1.0] * turning + [1e30] * (len(noise) - turning), dtype=np.float32)
    if name.endswith(("attn_q_norm.weight", "attn_k_norm.weight")):
        # Queries are not divided by anything: trained gains keep the products small.
        return (1 + 0.2 * noise) * np.float32(len(noise) ** -0.25)
    return None


SSF = [True, True, False]

RECIPES: dict[str, Recipe] = {
    "gemma": Recipe("gemma", usual_keys(), usual_tensors()),
    # The window of published files, beyond which mlx-lm and llama.cpp differ.
    "gemma2": Recipe(
        "gemma2",
        usual_keys(
            attention__sliding_window=4096,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
        ),
        usual_tensors(post_norms=True),
    ),
    "gemma2, low caps": Recipe(
        "gemma2",
        usual_keys(
            attention__sliding_window=4096,
            attn_logit_softcapping=0.5,
            final_logit_softcapping=1.5,
        ),
        usual_tensors(post_norms=True),
    ),
    # The square root of its width, which mlx-lm rounds to bfloat16, is no short number.
    "gemma3": _gemma3(width=768, rope__scaling__type="linear", rope__scaling__factor=8.0),
    "gemma3, untied, every third layer full": _gemma3(
        4,
        untied=True,
        attention__sliding_window_pattern=[*SSF, True],
        rope__freq_base_swa=5000.0,
        seed=2,
    ),
    "gemma3 without windows": _gemma3(
        3, attention__sliding_window=None, rope__scaling__type="linear", rope__scaling__factor=8.0
    ),
    "gemma4, per-layer inputs and shared keys": gemma4(
        [*SSF, *SSF], shared=3, per_layer=PER_LAYER, doubled=True
    ),
    "gemma4, keys as values": gemma4([*SSF, *SSF], keys_are_values=True),
    "gemma4, experts": gemma4(SSF, keys_are_values=True, experts=4),
    "gemma4, experts apart": gemma4(SSF, experts=4, fused=False),
}
