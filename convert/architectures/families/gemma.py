"""Gemma up to the third: gemma, gemma2 and gemma3, text only.

The converter adds one to every norm, because mlx-lm multiplies by one plus the weight.
"""

from __future__ import annotations

from typing import Any

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    plain,
    post_norm,
    refused,
)
from convert.architectures.families.llama import PLAIN
from convert.architectures.families.reasons import DRAFTS, EMBEDS
from convert.architectures.hf_keys import (
    Config,
    every_nth,
    head_dim,
    rope_theta,
    sliding_pattern,
)
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    rope_scaling,
    short,
    sliding_layers,
    sliding_window,
    unscaled_rotary,
    unsupported,
    whole_rotary,
)
from convert.architectures.weights import (
    ATTENTION,
    FEED_FORWARD,
    LESS_ONE,
    Names,
    Weight,
    changed,
    renamed,
)
from convert.base.errors import UserError
from convert.mlx.gemma2_window import WINDOW

POST_NORMS = {
    **ATTENTION,
    **FEED_FORWARD,
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
"""blk.N.* of Gemma 2 and later: a norm behind attention and one behind the feed-forward network."""


_LARGEST_2, _LARGEST_3 = 46, 62
"""Layers of the 27B models, whose queries llama.cpp divides by √(hidden / heads)."""


def _less_one(keys: Keys, names: Names) -> list[Weight]:
    return changed(renamed(keys, names), r"norm\.weight$", LESS_ONE)


def _gemma_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    unscaled_rotary(keys)
    return base_config(keys, "gemma") | {"tie_word_embeddings": True}


def _query_scale(keys: Keys, largest: int) -> int:
    """The square of the queries' divisor, which llama.cpp chooses by the number of layers."""
    heads = keys.integer("attention.head_count")
    per_head = int(keys.integer("embedding_length")) // int(heads)
    return per_head if keys.layers == largest else keys.integer("attention.key_length", per_head)


def _gemma2_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    unscaled_rotary(keys)
    base = keys.number("rope.freq_base", 10000.0)
    if keys.number("rope.freq_base_swa", base) != base:
        raise unsupported(
            keys, "turns its sliding layers at a rate of their own, but mlx-lm's gemma2 has one"
        )
    return base_config(keys, "gemma2") | {
        "tie_word_embeddings": True,
        # mlx-lm's gemma2 ignores this key; `convert.mlx.gemma2_window` uses it.
        "sliding_window": sliding_window(keys, WINDOW),
        "query_pre_attn_scalar": _query_scale(keys, _LARGEST_2),
        "attn_logit_softcapping": short(keys.number("attn_logit_softcapping", 50.0)),
        "final_logit_softcapping": short(keys.number("final_logit_softcapping", 30.0)),
    }


def _gemma3_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    if keys.number("final_logit_softcapping", 0.0):
        raise unsupported(
            keys, "caps its logits (final_logit_softcapping), which mlx-lm's gemma3 does not do"
        )
    scaling = rope_scaling(keys)
    if scaling is not None and scaling["type"] != "linear":
        raise unsupported(
            keys,
            f"stretches its rotary embedding by the method {scaling['type']!r}, which mlx-lm's "
            "gemma3 would apply to fewer layers than llama.cpp does",
        )
    window = keys.integer("attention.sliding_window", 0)
    pattern = 1
    if window:
        sliding = sliding_layers(keys, 6)
        # The first layer without a window is number `pattern`, counted from 1.
        pattern = sliding.index(False) + 1 if False in sliding else 0
        if not pattern or sliding != [(n + 1) % pattern != 0 for n in range(keys.layers)]:
            raise unsupported(
                keys,
                "gives the whole context to other layers than every n-th, which is all that "
                "mlx-lm's gemma3 can do",
            )
    return base_config(keys, "gemma3_text") | {
        "query_pre_attn_scalar": _query_scale(keys, _LARGEST_3),
        "rope_local_base_freq": keys.number("rope.freq_base_swa", 10000.0),
        "rope_scaling": scaling,
        "sliding_window": window or keys.integer("context_length"),
        "sliding_window_pattern": pattern,
    }


# --------------------------------------------------------------------------------------------------
# From folders


def _gemma_keys(flat: Config) -> dict[str, Any]:
    """Files leave out the rotary base, for which llama.cpp takes 10000."""
    base = rope_theta(flat)
    return {
        "attention.key_length": head_dim(flat),
        "attention.value_length": head_dim(flat),
        "rope.freq_base": None if base == 10000.0 else base,
    }


def _gemma2_keys(flat: Config) -> dict[str, Any]:
    values = _gemma_keys(flat)
    for key, default in (("attn", 50.0), ("final", 30.0)):
        cap = flat.get(f"{key}_logit_softcapping", default)
        if cap is None:
            raise UserError(
                f"config.json sets {key}_logit_softcapping to null, but llama.cpp always caps "
                f"Gemma 2: set it to a number such as {default}."
            )
        values[f"{key}_logit_softcapping"] = float(cap)
    values["attention.sliding_window"] = max(0, int(flat.get("sliding_window") or 4096))
    return values


def _gemma3_keys(flat: Config) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if flat.get("attn_logit_softcapping") is not None:
        raise UserError(
            "config.json sets attn_logit_softcapping, which Gemma 3 does not have: remove it."
        )
    if flat.get("final_logit_softcapping") is not None:
        values["final_logit_softcapping"] = float(flat["final_logit_softcapping"])
    pattern = sliding_pattern(flat)
    if any(pattern):
        values |= every_nth(flat, 6)
    return values


# transformers' defaults for keys that a Gemma 3 config (inside a multimodal one) leaves out.
_GEMMA3_DEFAULTS: dict[str, Any] = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "rope_theta": 1_000_000.0,
    "rope_local_base_freq": 10_000.0,
}

ARCHITECTURES = (
    Architecture(
        "gemma",
        plain(),
        InMlx(_gemma_config, PLAIN, _less_one),
        (FromFolder(("gemma",), _gemma_keys, always_tied=True),),
    ),
    Architecture(
        "gemma2",
        post_norm(),
        InMlx(_gemma2_config, Names(POST_NORMS), _less_one),
        (
            FromFolder(
                ("gemma2",),
                _gemma2_keys,
                always_tied=True,
                rescaled=".q_proj.weight",
                largest=_LARGEST_2,
            ),
        ),
    ),
    Architecture(
        "gemma3",
        post_norm(),
        InMlx(_gemma3_config, Names(POST_NORMS), _less_one),
        (
            FromFolder(
                ("gemma3", "gemma3_text"),
                _gemma3_keys,
                tied_by_default=True,
                rescaled=".q_norm.weight",
                largest=_LARGEST_3,
                defaults=_GEMMA3_DEFAULTS,
            ),
        ),
    ),
    *refused("gemma-embedding", EMBEDS),
    *refused("gemma4-assistant", DRAFTS),
    *refused(
        "gemma3n",
        "its four streams are mixed by learned matrices (AltUp) and written to through Laurel and "
        "per-layer inputs, which no removal of one direction from weights undoes.",
    ),
)
