"""Pixtral and Mistral Small 3.1: a tower of llama's blocks, for pictures of any shape.

llama.cpp ends each row of patches with the embedding of the token [IMG_BREAK], and loads no
projector without it. Its converter took it from the language model's embedding until May 2026, and
has left it out since (https://github.com/ggml-org/llama.cpp/issues/24235). It is written here,
from the unedited embedding.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from convert.base import json_text
from convert.base.errors import UserError
from convert.projectors.siglip import block
from convert.projectors.tower import Family, Part, Tower, kernel

_BREAK = "[IMG_BREAK]"


def _fits(config: Mapping[str, Any]) -> bool:
    vision = config.get("vision_config")
    return (
        config.get("model_type") in ("llava", "mistral3", "pixtral")
        and isinstance(vision, dict)
        and vision.get("model_type") == "pixtral"
    )


def _keys(tower: Tower) -> dict[str, Any]:
    act = tower.vision["hidden_act"]
    if act not in ("silu", "gelu"):
        raise UserError(f'its tower\'s hidden_act is "{act}", and llama.cpp knows silu and gelu')
    keys: dict[str, Any] = {
        "clip.vision.attention.layer_norm_epsilon": tower.real("layer_norm_eps"),
        f"clip.use_{act}": True,
    }
    merged = tower.config.get("spatial_merge_size")
    if merged is None and tower.config.get("model_type") == "mistral3":
        merged = 2
    if merged is not None:
        keys["clip.vision.spatial_merge_size"] = int(merged)
    return keys


def _patches(tower: Tower, name: str) -> list[Part]:
    return [Part("v.patch_embd.weight", kernel(tower, name, tower.count("num_channels"), 2))]


def _interleaved(tower: Tower, name: str) -> list[Part]:
    """Rows of queries or keys, the two halves of each head by turns, as llama.cpp rotates them."""
    found = re.search(r"layers\.(\d+)\.attention\.([qk])_proj\.(weight|bias)$", name)
    assert found
    heads, rows = tower.count("num_attention_heads"), tower.shapes[name][0]
    if rows % (2 * heads):
        raise UserError(f"{name} has {rows} rows, which are not those of {heads} heads")
    order = np.arange(rows).reshape(heads, 2, -1).swapaxes(1, 2).reshape(-1)
    return [Part(f"v.blk.{found[1]}.attn_{found[2]}.{found[3]}", lambda values: values[order])]


def _break(tower: Tower, name: str) -> list[Part]:
    token = _token(tower)
    if token >= tower.shapes[name][0]:
        raise UserError(f"{name} has no row for the token {_BREAK}")

    def row(values: np.ndarray) -> np.ndarray:
        return values[token]

    return [Part("v.token_embd.img_break", row)] if token else []


def _token(tower: Tower) -> int:
    """The id of [IMG_BREAK].

    Raises:
        UserError: when the tokenizer has no such token.
    """
    config = tower.folder / "tokenizer_config.json"
    if config.is_file():
        known = json_text.read(config).get("added_tokens_decoder")
        for token, facts in (known if isinstance(known, dict) else {}).items():
            if isinstance(facts, dict) and facts.get("content") == _BREAK:
                return int(token)
    tokenizer = tower.folder / "tokenizer.json"
    added = json_text.read(tokenizer).get("added_tokens") if tokenizer.is_file() else None
    for facts in added if isinstance(added, list) else []:
        if isinstance(facts, dict) and facts.get("content") == _BREAK:
            return int(facts["id"])
    raise UserError(f"the tokenizer has no token {_BREAK}")


_IN_BLOCK = {
    "attention_norm": "ln1",
    "ffn_norm": "ln2",
    "attention.v_proj": "attn_v",
    "attention.o_proj": "attn_out",
    "feed_forward.gate_proj": "ffn_gate",
    "feed_forward.up_proj": "ffn_up",
    "feed_forward.down_proj": "ffn_down",
}

_PROJECTOR = r"multi_modal_projector\."

FAMILIES = (
    Family(
        "pixtral",
        _fits,
        _keys,
        {
            r"^model\.(?=vision_tower\.|multi_modal_projector\.)": "",
            r"^vision_tower\.vision_model\.": "vision_tower.",
        },
        {
            **block(r"vision_tower\.transformer\.layers\.", _IN_BLOCK),
            r"vision_tower\.ln_pre\.weight": "v.pre_ln.weight",
            rf"{_PROJECTOR}norm\.weight": "mm.input_norm.weight",
            rf"{_PROJECTOR}patch_merger\.merging_layer\.weight": "mm.patch_merger.weight",
            rf"{_PROJECTOR}linear_([12])\.(weight|bias)": r"mm.\1.\2",
        },
        {
            r"vision_tower\.patch_conv\.weight": _patches,
            r".*\.attention\.[qk]_proj\.(weight|bias)": _interleaved,
            r".*\bembed_tokens\.weight": _break,
        },
        defaults={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_channels": 3,
            "image_size": 1024,
            "patch_size": 16,
            "hidden_act": "gelu",
            "layer_norm_eps": 1e-5,
        },
        borrowed=r".*\bembed_tokens\.weight",
    ),
)
