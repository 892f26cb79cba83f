"""Cohere's command-r and cohere2: attention and feed-forward network side by side."""

from __future__ import annotations

from typing import Any

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    edited,
    plain,
)
from convert.architectures.families.llama import PLAIN
from convert.architectures.hf_keys import Config, count, every_nth, real
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    short,
    sliding_layers,
    sliding_window,
    unscaled_rotary,
    unsupported,
    whole_rotary,
)


def _config(keys: Keys, model_type: str) -> dict[str, Any]:
    whole_rotary(keys)
    unscaled_rotary(keys)
    return base_config(keys, model_type) | {
        "layer_norm_eps": short(keys.number("attention.layer_norm_epsilon")),
        "logit_scale": short(keys.number("logit_scale", 0.0)) or 1.0,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in keys.tensors,
        "tie_word_embeddings": True,
    }


def _cohere_config(keys: Keys) -> dict[str, Any]:
    return _config(keys, "cohere")


def _cohere2_config(keys: Keys) -> dict[str, Any]:
    slides = sliding_layers(keys, 4)
    # In mlx-lm every n-th layer has no window and all others have one; both kinds must occur.
    period = slides.index(False) + 1 if False in slides else 0
    if period < 2 or slides != [(layer + 1) % period != 0 for layer in range(keys.layers)]:
        raise unsupported(
            keys,
            "has sliding windows in other layers than all but every n-th, which is the only "
            "pattern mlx-lm's cohere2 can run",
        )
    return _config(keys, "cohere2") | {
        "sliding_window": sliding_window(keys),
        "sliding_window_pattern": period,
    }


def _cohere_keys(flat: Config) -> dict[str, Any]:
    longest = "model_max_length" if flat.get("model_max_length") else "max_position_embeddings"
    return {
        "context_length": count(flat, longest),
        "logit_scale": real(flat, "logit_scale"),
        "rope.scaling.type": "none",
    }


def _cohere2_keys(flat: Config) -> dict[str, Any]:
    share = flat.get("rotary_pct")
    head = count(flat, "hidden_size") // count(flat, "num_attention_heads")
    return every_nth(flat, 4) | {
        "logit_scale": real(flat, "logit_scale"),
        "vocab_size": count(flat, "vocab_size"),
        "rope.dimension_count": int(head * (1.0 if share is None else float(share))),
        "rope.scaling.type": "none",
    }


ARCHITECTURES = (
    Architecture(
        "command-r",
        plain(),
        InMlx(_cohere_config, PLAIN),
        (FromFolder(("cohere",), _cohere_keys, always_tied=True),),
    ),
    Architecture(
        "cohere2",
        plain(),
        InMlx(_cohere2_config, PLAIN),
        (FromFolder(("cohere2",), _cohere2_keys, says_head=True, always_tied=True),),
    ),
    *edited("cohere2moe", plain()),
)
