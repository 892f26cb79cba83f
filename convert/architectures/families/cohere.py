"""Cohere's command-r and cohere2: attention and feed-forward network side by side."""

from __future__ import annotations

from typing import Any

from convert.architectures.architecture import (
    Architecture,
    InMlx,
    edited,
    plain,
)
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
from convert.architectures.weights import ATTENTION, FEED_FORWARD, Weight, renamed


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


def _weights(keys: Keys) -> list[Weight]:
    return renamed(keys, {**ATTENTION, **FEED_FORWARD})


ARCHITECTURES = (
    Architecture("command-r", plain(), InMlx(_cohere_config, _weights)),
    Architecture("cohere2", plain(), InMlx(_cohere2_config, _weights)),
    *edited("cohere2moe", plain()),
)
