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
        recipe: the name of the language model's recipe.
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


def _gemma4(width: int) -> Shapes:
    head = WIDE // HEADS
    square = dict.fromkeys((f"self_attn.{one}_proj" for one in "qkvo"), (WIDE, WIDE))
    linear = {
        **square,
        "mlp.gate_proj": (BETWEEN, WIDE),
        "mlp.up_proj": (BETWEEN, WIDE),
        "mlp.down_proj": (WIDE, BETWEEN),
    }
    norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    found: Shapes = {}
    for layer in range(DEEP):
        block = f"model.vision_tower.encoder.layers.{layer}."
        for name, shape in linear.items():
            found[f"{block}{name}.linear.weight"] = shape
            for limit in ("input_min", "input_max", "output_min", "output_max"):
                found[f"{block}{name}.{limit}"] = ()
        found |= {f"{block}{one}_layernorm.weight": (WIDE,) for one in norms}
        found |= {f"{block}self_attn.{one}_norm.weight": (head,) for one in "qk"}
    return {
        **found,
        "model.vision_tower.patch_embedder.input_proj.weight": (WIDE, 3 * PATCH * PATCH),
        "model.vision_tower.patch_embedder.position_embedding_table": (2, 64, WIDE),
        "model.vision_tower.std_bias": (WIDE,),
        "model.vision_tower.std_scale": (WIDE,),
        "model.embed_vision.embedding_projection.weight": (width, WIDE),
    }


def _qwen2(width: int) -> Shapes:
    linear = {
        "attn.qkv": (3 * WIDE, WIDE),
        "attn.proj": (WIDE, WIDE),
        "mlp.fc1": (4 * WIDE, WIDE),
        "mlp.fc2": (WIDE, 4 * WIDE),
    }
    return {
        **_blocks("visual.blocks.", linear, _norm("norm1", "norm2")),
        "visual.patch_embed.proj.weight": (WIDE, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (WIDE,),
        "visual.merger.ln_q.bias": (WIDE,),
        "visual.merger.mlp.0.weight": (4 * WIDE, 4 * WIDE),
        "visual.merger.mlp.0.bias": (4 * WIDE,),
        "visual.merger.mlp.2.weight": (width, 4 * WIDE),
        "visual.merger.mlp.2.bias": (width,),
    }


def _qwen25(width: int) -> Shapes:
    linear = {
        "attn.qkv": (3 * WIDE, WIDE),
        "attn.proj": (WIDE, WIDE),
        "mlp.gate_proj": (BETWEEN, WIDE),
        "mlp.up_proj": (BETWEEN, WIDE),
        "mlp.down_proj": (WIDE, BETWEEN),
    }
    return {
        **_blocks("visual.blocks.", linear, ("norm1.weight", "norm2.weight")),
        "visual.patch_embed.proj.weight": (WIDE, 3, 2, 14, 14),
        "visual.merger.ln_q.weight": (WIDE,),
        "visual.merger.mlp.0.weight": (4 * WIDE, 4 * WIDE),
        "visual.merger.mlp.0.bias": (4 * WIDE,),
        "visual.merger.mlp.2.weight": (width, 4 * WIDE),
        "visual.merger.mlp.2.bias": (width,),
    }


def _merger(stem: str, width: int, normed: int) -> Shapes:
    return {
        f"{stem}norm.weight": (normed,),
        f"{stem}norm.bias": (normed,),
        f"{stem}linear_fc1.weight": (4 * WIDE, 4 * WIDE),
        f"{stem}linear_fc1.bias": (4 * WIDE,),
        f"{stem}linear_fc2.weight": (width, 4 * WIDE),
        f"{stem}linear_fc2.bias": (width,),
    }


def _qwen35(width: int) -> Shapes:
    linear = {
        "attn.qkv": (3 * WIDE, WIDE),
        "attn.proj": (WIDE, WIDE),
        "mlp.linear_fc1": (BETWEEN, WIDE),
        "mlp.linear_fc2": (WIDE, BETWEEN),
    }
    stem = "model.visual."
    return {
        **_blocks(f"{stem}blocks.", linear, _norm("norm1", "norm2")),
        f"{stem}patch_embed.proj.weight": (WIDE, 3, 2, 16, 16),
        f"{stem}patch_embed.proj.bias": (WIDE,),
        f"{stem}pos_embed.weight": (64, WIDE),
        **_merger(f"{stem}merger.", width, WIDE),
    }


def _qwen3(width: int) -> Shapes:
    stem = "model.visual.deepstack_merger_list."
    deep = [_merger(f"{stem}{index}.", width, 4 * WIDE) for index in range(2)]
    return {**_qwen35(width), **deep[0], **deep[1]}


def _pixtral(width: int) -> Shapes:
    linear = {
        **_square(*(f"attention.{one}_proj" for one in "qkvo")),
        "feed_forward.gate_proj": (BETWEEN, WIDE),
        "feed_forward.up_proj": (BETWEEN, WIDE),
        "feed_forward.down_proj": (WIDE, BETWEEN),
    }
    norms = ("attention_norm.weight", "ffn_norm.weight")
    return {
        **_blocks("vision_tower.transformer.layers.", linear, norms, biased=False),
        "vision_tower.patch_conv.weight": (WIDE, 3, PATCH, PATCH),
        "vision_tower.ln_pre.weight": (WIDE,),
        "multi_modal_projector.linear_1.weight": (width, WIDE),
        "multi_modal_projector.linear_1.bias": (width,),
        "multi_modal_projector.linear_2.weight": (width, width),
        "multi_modal_projector.linear_2.bias": (width,),
    }


def _mistral3(width: int) -> Shapes:
    found = {name: one for name, one in _pixtral(width).items() if not name.endswith("bias")}
    return {
        **found,
        "multi_modal_projector.norm.weight": (WIDE,),
        "multi_modal_projector.patch_merger.merging_layer.weight": (WIDE, 4 * WIDE),
    }


def _llama4(width: int) -> Shapes:
    stem = "vision_model."
    linear = {
        **_square(*(f"self_attn.{one}_proj" for one in "qkvo")),
        "mlp.fc1": (BETWEEN, WIDE),
        "mlp.fc2": (WIDE, BETWEEN),
    }
    norms = _norm("input_layernorm", "post_attention_layernorm")
    return {
        **_blocks(f"{stem}model.layers.", linear, norms),
        f"{stem}class_embedding": (WIDE,),
        f"{stem}positional_embedding_vlm": (65, WIDE),
        f"{stem}patch_embedding.linear.weight": (WIDE, 3 * PATCH * PATCH),
        **{f"{stem}{one}": (WIDE,) for one in _norm("layernorm_pre", "layernorm_post")},
        f"{stem}vision_adapter.mlp.fc1.weight": (48, 4 * WIDE),
        f"{stem}vision_adapter.mlp.fc2.weight": (48, 48),
        "multi_modal_projector.linear_1.weight": (width, 48),
    }


_SIZES = {
    "hidden_size": WIDE,
    "intermediate_size": BETWEEN,
    "num_hidden_layers": DEEP,
    "num_attention_heads": HEADS,
    "image_size": 64,
    "patch_size": PATCH,
}

_FROM_VISUAL = {r"^(model\.)?visual\.": "vision_tower."}

_QWEN3 = {
    "depth": DEEP,
    "hidden_size": WIDE,
    "intermediate_size": BETWEEN,
    "num_heads": HEADS,
    "in_channels": 3,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 64,
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
    "gemma4": Seeing(
        "gemma4, keys as values",
        "gemma4",
        "Gemma4ForConditionalGeneration",
        {
            "model_type": "gemma4_vision",
            **_SIZES,
            "num_key_value_heads": HEADS,
            "head_dim": WIDE // HEADS,
            "position_embedding_size": 64,
            "pooling_kernel_size": 3,
            "use_clipped_linears": True,
            "standardize": True,
        },
        _gemma4,
        mlx_names={r"^model\.": ""},
        config={"audio_config": None, "vocab_size": tiny.VOCAB_SIZE},
    ),
    "qwen2-vl": Seeing(
        "qwen2vl",
        "qwen2_vl",
        "Qwen2VLForConditionalGeneration",
        {
            "model_type": "qwen2_vl",
            "depth": DEEP,
            "embed_dim": WIDE,
            "hidden_size": 256,
            "mlp_ratio": 4,
            "num_heads": HEADS,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        _qwen2,
        mlx_names=_FROM_VISUAL,
        kernel="patch_embed.proj.weight",
        text=None,
    ),
    "qwen2.5-vl": Seeing(
        "qwen2vl",
        "qwen2_5_vl",
        "Qwen2_5_VLForConditionalGeneration",
        {
            "model_type": "qwen2_5_vl",
            "depth": DEEP,
            "hidden_size": WIDE,
            "intermediate_size": BETWEEN,
            "num_heads": HEADS,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 56,
            "fullatt_block_indexes": [1, 3],
        },
        _qwen25,
        mlx_names=_FROM_VISUAL,
        kernel="patch_embed.proj.weight",
        text=None,
    ),
    "qwen3-vl": Seeing(
        "qwen3vl",
        "qwen3_vl",
        "Qwen3VLForConditionalGeneration",
        {**_QWEN3, "model_type": "qwen3_vl", "deepstack_visual_indexes": [1, 2]},
        _qwen3,
        {},
        _FROM_VISUAL,
        "patch_embed.proj.weight",
        text=None,
    ),
    "qwen3-vl-moe": Seeing(
        "qwen3vlmoe",
        "qwen3_vl_moe",
        "Qwen3VLMoeForConditionalGeneration",
        {**_QWEN3, "model_type": "qwen3_vl_moe", "deepstack_visual_indexes": [1, 2]},
        _qwen3,
        {},
        _FROM_VISUAL,
        "patch_embed.proj.weight",
        text=None,
    ),
    "qwen3.5": Seeing(
        "qwen35, and drafting",
        "qwen3_5",
        "Qwen3_5ForConditionalGeneration",
        {**_QWEN3, "model_type": "qwen3_5", "deepstack_visual_indexes": []},
        _qwen35,
        {},
        _FROM_VISUAL,
        "patch_embed.proj.weight",
        text=None,
    ),
    "pixtral": Seeing(
        "mistral, heads of another size",
        "llava",
        "LlavaForConditionalGeneration",
        {**_SIZES, "model_type": "pixtral", "hidden_act": "gelu"},
        _pixtral,
        {r"^": "language_model."},
        {r"^vision_tower\.": "vision_tower.vision_model."},
        "patch_conv.weight",
        text={"model_type": "mistral"},
        token="[IMG_BREAK]",
    ),
    "mistral3": Seeing(
        "mistral3",
        "mistral3",
        "Mistral3ForConditionalGeneration",
        {**_SIZES, "model_type": "pixtral", "hidden_act": "silu"},
        _mistral3,
        {r"^": "language_model."},
        {r"^vision_tower\.": "vision_tower.vision_model."},
        "patch_conv.weight",
        config={"spatial_merge_size": 2},
        text={"model_type": "mistral"},
        token="[IMG_BREAK]",
    ),
    "llama4": Seeing(
        "llama4",
        "llama4",
        "Llama4ForConditionalGeneration",
        {**_SIZES, "model_type": "llama4_vision_model", "pixel_shuffle_ratio": 0.5},
        _llama4,
        text=None,
    ),
}
"""A name -> the family, in some form."""


def noise(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Random values that depend on the name alone; norms about one."""
    values = np.random.default_rng(zlib.crc32(name.encode())).normal(size=shape)
    if not shape:  # a limit
        return np.float32(8 if name.endswith("max") else -8) + np.float32(values)
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
    if family.token is not None:
        _add_token(folder, family.token)
    weights = {
        _renamed(one, family.text_names): value
        for one, value in mx.load(str(folder / "model.safetensors")).items()
    }
    for one, value in towers(family, text.get("text_config", text)["hidden_size"]).items():
        if mlx and family.kernel and one.endswith(family.kernel):
            value = np.moveaxis(value, 1, -1)
        to = _renamed(one, family.mlx_names) if mlx else one
        weights[to] = mx.array(np.ascontiguousarray(value)).astype(getattr(mx, dtype))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})
    return folder


def _add_token(folder: Path, text: str) -> None:
    """Give the tokenizer's last token another text, as a token that is not made by merging."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    old, number = max(vocabulary.items(), key=lambda item: item[1])
    del vocabulary[old]
    merges = content["model"]["merges"]
    content["model"]["merges"] = [
        one for one in merges if ("".join(one) if isinstance(one, list) else one.replace(" ", ""))
        != old
    ]  # fmt: skip
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    content["added_tokens"].append({"id": number, "content": text, "special": True, **flags})
    path.write_text(json.dumps(content), encoding="utf-8")


def _renamed(name: str, patterns: dict[str, str]) -> str:
    for pattern, new in patterns.items():
        name = re.sub(pattern, new, name, count=1)
    return name
