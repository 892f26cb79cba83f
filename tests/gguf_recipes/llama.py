"""Tiny llama, mistral, mixtral, qwen2 and qwen3 files."""

from __future__ import annotations

from typing import Any

from tests.tiny_gguf import VOCAB, Recipe, Shapes

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


RECIPES: dict[str, Recipe] = {
    "llama": Recipe("llama", usual_keys(), usual_tensors()),
    "mistral, heads of another size": Recipe(
        "llama",
        usual_keys(attention__key_length=64, attention__value_length=64, rope__dimension_count=64),
        usual_tensors(head=64, tied=True),
    ),
    "mixtral": Recipe(
        "llama",
        usual_keys(expert_count=4, expert_used_count=2, feed_forward_length=256),
        usual_tensors(experts=4),
        seed=1,
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
