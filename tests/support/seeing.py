"""Tiny folders of models that see, with random towers, as publishers and mlx-vlm lay them out.

The language model is a recipe of `tests.support.gguf_recipes` in its published form. The tower's
values depend on names alone, so that a folder is the same each time.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tests.support import published, tiny

Shapes = dict[str, tuple[int, ...]]

DEEP, WIDE, BETWEEN = 4, 64, 96
"""Blocks, width and inner width of every tower."""

HEADS, PATCH = 4, 8

_MEAN, _STD = [0.48, 0.45, 0.40], [0.26, 0.25, 0.5]

PROCESSOR: dict[str, Any] = {"image_mean": _MEAN, "image_std": _STD, "do_resize": True}


@dataclass(frozen=True)
class Seeing:
    """A family of models that see.

    Attributes:
        recipe: the language model.
        model_type, klass: model_type of config.json and the class that llama.cpp's converter goes
            by.
        vision: vision_config.
        tower: the tower's tensors under their publisher's names, from the language model's width.
        text_names: pattern -> replacement, from the language model's own names to the publisher's.
        mlx_names: the same from the publisher's names to mlx-vlm's.
        kernel: the end of the name of the kernel that MLX stores with its channels last.
        config: further keys of config.json.
        text: further keys of text_config; None where the language model's keys lie at the top.
        processor: the settings of pictures.
        token: the text of a token that the tokenizer has.
    """

    recipe: str
    model_type: str
    klass: str
    vision: dict[str, Any]
    tower: Callable[[int], Shapes]
    text_names: dict[str, str] = field(default_factory=dict)
    mlx_names: dict[str, str] = field(default_factory=dict)
    kernel: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=lambda: dict(PROCESSOR))
    token: str | None = None


def _blocks(stem: str, linear: Shapes, norms: tuple[str, ...], *, biased: bool = True) -> Shapes:
    found: Shapes = {}
    for layer in range(DEEP):
        for name, shape in linear.items():
            found[f"{stem}{layer}.{name}.weight"] = shape
            if biased:
                found[f"{stem}{layer}.{name}.bias"] = shape[:1]
        for name in norms:
            found[f"{stem}{layer}.{name}"] = (WIDE,)
    return found


def _norm(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}.{part}" for name in names for part in ("weight", "bias"))


def _square(*names: str) -> Shapes:
    return dict.fromkeys(names, (WIDE, WIDE))


def _gemma3(width: int) -> Shapes:
    stem = "vision_tower.vision_model."
    linear = {
        **_square(*(f"self_attn.{one}_proj" for one in ("q", "k", "v", "out"))),
        "mlp.fc1": (BETWEEN, WIDE),
        "mlp.fc2": (WIDE, BETWEEN),
    }
    return {
        **_blocks(f"{stem}encoder.layers.", linear, _norm("layer_norm1", "layer_norm2")),
        f"{stem}embeddings.patch_embedding.weight": (WIDE, 3, PATCH, PATCH),
        f"{stem}embeddings.patch_embedding.bias": (WIDE,),
        f"{stem}embeddings.position_embedding.weight": (64, WIDE),
        **{f"{stem}post_layernorm.{part}": (WIDE,) for part in ("weight", "bias")},
        "multi_modal_projector.mm_input_projection_weight": (WIDE, width),
        "multi_modal_projector.mm_soft_emb_norm.weight": (WIDE,),
    }


_SIZES = {
    "hidden_size": WIDE,
    "intermediate_size": BETWEEN,
    "num_hidden_layers": DEEP,
    "num_attention_heads": HEADS,
    "image_size": 64,
    "patch_size": PATCH,
}

FAMILIES: dict[str, Seeing] = {
    "gemma3": Seeing(
        "gemma3",
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"model_type": "siglip_vision_model", **_SIZES},
        _gemma3,
        {r"^": "language_model."},
        kernel="patch_embedding.weight",
        config={"vocab_size": tiny.VOCAB_SIZE},
        # Two tokens of each side: llama.cpp's own pooling by four.
        processor={**PROCESSOR, "image_seq_length": 4},
    ),
    "gemma3, pooled by two": Seeing(
        "gemma3",
        "gemma3",
        "Gemma3ForConditionalGeneration",
        {"model_type": "siglip_vision_model", **_SIZES, "layer_norm_eps": 1e-5},
        _gemma3,
        {r"^": "language_model."},
        kernel="patch_embedding.weight",
        config={"vocab_size": tiny.VOCAB_SIZE},
        processor={**PROCESSOR, "image_seq_length": 16},
    ),
}
"""A name -> the family, in some form."""


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values that depend on the name alone; norms about one."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    return (1 + 0.2 * values if "norm" in name else values / np.sqrt(shape[-1])).astype(np.float32)


def towers(family: Seeing, width: int) -> dict[str, np.ndarray]:
    """The tower's tensors under their publisher's names."""
    return {name: noise(name, shape) for name, shape in family.tower(width).items()}


def write(folder: Path, name: str, *, mlx: bool = False, dtype: str = "float32") -> Path:
    """Write a family's model.

    Args:
        folder: must not exist.
        name: of `FAMILIES`.
        mlx: lay the tower out as mlx-vlm does, and not as its publisher.
        dtype: of every tensor.
    """
    family = FAMILIES[name]
    published.write(folder, family.recipe, dtype)
    text = json.loads((folder / "config.json").read_text())
    special = {key: text[key] for key in ("eos_token_id", "bos_token_id") if key in text}
    if family.text is None:
        config = text
    else:
        config = {**special, "text_config": {**text, **family.text}}
        config["text_config"].pop("architectures")
    config |= {
        "model_type": family.model_type,
        "architectures": [family.klass],
        "vision_config": family.vision,
        **family.config,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    (folder / "preprocessor_config.json").write_text(json.dumps(family.processor))
    weights = {
        _renamed(one, family.text_names): value
        for one, value in mx.load(str(folder / "model.safetensors")).items()
    }
    for one, value in towers(family, text["hidden_size"]).items():
        if mlx and family.kernel and one.endswith(family.kernel):
            value = np.moveaxis(value, 1, -1)
        to = _renamed(one, family.mlx_names) if mlx else one
        weights[to] = mx.array(np.ascontiguousarray(value)).astype(getattr(mx, dtype))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder


def _renamed(name: str, patterns: dict[str, str]) -> str:
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name, count=1)
    return name
