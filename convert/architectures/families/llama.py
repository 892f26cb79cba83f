"""Llama and its nearest relatives: llama (Mistral and Mixtral among them), qwen2, qwen3."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np

from convert.architectures.architecture import (
    Architecture,
    FromFolder,
    InMlx,
    edited,
    plain,
    refused,
)
from convert.architectures.families.reasons import EMBEDS
from convert.architectures.hf_keys import Config, count, rotary_dim
from convert.architectures.keys import Keys
from convert.architectures.mlx_config import (
    base_config,
    experts_used,
    rope_scaling,
    unscaled_rotary,
    whole_rotary,
)
from convert.architectures.stored import EXPERTS as EXPERTS_STORED
from convert.architectures.stored import Stored
from convert.architectures.weights import (
    ATTENTION,
    EXPERTS,
    FEED_FORWARD,
    Names,
    Weight,
    half_split_rows,
    renamed,
    reordered,
)
from convert.base.errors import UserError
from convert.gguf.layout import TensorEntry


def unpermuted(keys: Keys, weights: list[Weight]) -> list[Weight]:
    """The Weights with Q and K rows in mlx-lm's order."""
    heads = {
        "q": keys.count("attention.head_count"),
        "k": keys.count("attention.head_count_kv", keys.integer("attention.head_count")),
    }

    def rows(entry: TensorEntry) -> np.ndarray:
        which = re.search(r"attn_([qk])\.", entry.name)
        assert which
        # A bias is one row of GGUF's, but has as many elements as its weight has rows.
        count = entry.shape[0]
        if count % (2 * heads[which[1]]):
            raise UserError(
                f"{keys.source.parts[0]}: {entry.name} has {count} rows, which are not those of "
                f"{heads[which[1]]} heads: get the file again."
            )
        return half_split_rows(count, heads[which[1]])

    return reordered(weights, r"\.(q_proj|k_proj)\.(weight|bias)$", rows, keys)


def _llama_config(keys: Keys) -> dict[str, Any]:
    whole_rotary(keys)
    if keys.integer("expert_count", 0):
        unscaled_rotary(keys)
        return base_config(keys, "mixtral") | {
            "num_local_experts": keys.integer("expert_count"),
            "num_experts_per_tok": experts_used(keys),
        }
    return base_config(keys, "llama") | biases(keys) | {"rope_scaling": rope_scaling(keys)}


def llama_keys(flat: Config) -> dict[str, Any]:
    """What llama and its nearest relatives have beside the usual keys."""
    return {"vocab_size": count(flat, "vocab_size"), "rope.dimension_count": rotary_dim(flat)}


def biases(keys: Keys) -> dict[str, bool]:
    """The keys with which configs of llama and its relatives say which biases there are."""
    return {
        "attention_bias": "blk.0.attn_q.bias" in keys.tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in keys.tensors,
    }


def permuted(keys: Keys, names: Names) -> list[Weight]:
    """The Weights of llama and its relatives, whose Q and K rows the converter reorders."""
    return unpermuted(keys, renamed(keys, names))


def either_rotation(folder: FromFolder) -> tuple[FromFolder, ...]:
    """The entry, and before it the one for rope_traditional: rows are interleaved already."""
    return (
        replace(folder, when=lambda flat: bool(flat.get("rope_traditional")), arranged=renamed),
        folder,
    )


PLAIN = Names({**ATTENTION, **FEED_FORWARD})
"""The names of most dense models."""

_MIXTRAL = {
    name: "block_sparse_moe." + module.removeprefix("mlp.") for name, module in EXPERTS.items()
}
_LLAMA = Names({**ATTENTION, **FEED_FORWARD, **_MIXTRAL})


def qwen_config(model_type: str) -> Any:
    """The config.json of qwen2 and qwen3."""
    return lambda keys: base_config(keys, model_type) | {"rope_scaling": rope_scaling(keys)}


ARCHITECTURES = (
    Architecture(
        "llama",
        plain(),
        InMlx(_llama_config, _LLAMA, permuted),
        (
            *either_rotation(
                FromFolder(("llama", "mistral", "llava", "pixtral"), llama_keys, says_head=True)
            ),
            *either_rotation(FromFolder(("mixtral",), llama_keys, Stored(EXPERTS_STORED))),
        ),
    ),
    Architecture("qwen2", plain(), InMlx(qwen_config("qwen2"), PLAIN), (FromFolder(("qwen2",)),)),
    Architecture(
        "qwen3",
        plain(reads="cls.output"),
        InMlx(qwen_config("qwen3"), PLAIN),
        (FromFolder(("qwen3",)),),
    ),
    *edited("deci mistral4", plain()),
    *refused("llama-embed", EMBEDS),
)
