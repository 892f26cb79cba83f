"""Tiny random GGUFs of many architectures, as llama.cpp's own converter would lay them out.

Every architecture has a recipe: metadata without the architecture's prefix, and the shape of each
tensor in NumPy's order. Sizes are multiples of 256 where a K-quant's rows shall fit.
"""

from __future__ import annotations

import re
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType

from convert.mlx_to_gguf import encode
from convert.tokenizers.to_gguf import read_tokenizer
from tests.support import tiny

VOCAB = tiny.VOCAB_SIZE

END = 0
"""The token that ends a reply, and that no model here says."""

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Recipe:
    """A tiny model.

    Attributes:
        architecture: general.architecture.
        keys: metadata without the architecture's prefix.
        tensors: name -> shape in NumPy's order: (out, in), (experts, out, in).
        values: a tensor's name and standard-normal noise of its shape -> its values; None to use
            `usual_values`. For what must be a decay, a table or a small number.
        more: further metadata, under their full names.
        seed: of the values. llama.cpp's 8-bit activations may send a token to another expert than
            MLX does; another seed avoids such a near tie.
    """

    architecture: str
    keys: dict[str, Any]
    tensors: Shapes
    values: Callable[[str, np.ndarray], np.ndarray | None] | None = None
    more: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


@cache
def tokenizer_keys() -> dict[str, Any]:
    """A byte-level tokenizer of `VOCAB` tokens that never ends a reply by chance."""
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_tokenizer(Path(folder), "bpe")
        keys = dict(read_tokenizer(Path(folder), VOCAB).metadata())
    # A random model's greedy reply should not end early: the one token that ends a reply is given
    # a logit of zero in `write`. llama.cpp also goes by the texts of tokens.
    for key in ("eos_token_id", "eot_token_id", "eom_token_id"):
        keys[f"tokenizer.ggml.{key}"] = END
    keys["tokenizer.ggml.tokens"] = [
        text.replace("<|", "[").replace("|>", "]") for text in keys["tokenizer.ggml.tokens"]
    ]
    keys.pop("tokenizer.chat_template", None)
    return keys


def usual_values(name: str, noise: np.ndarray) -> np.ndarray:
    """Values at whose scale mistakes show: norms about one, biases not zero, logits spread by 0.6.

    A misplaced row moves log-probabilities by about that; llama.cpp, which rounds activations to 8
    bits beside quantized weights, moves them by a twentieth of it. Experts are much alike, because
    that rounding may send a token to another one.
    """
    if "_exps." in name and noise.ndim == 3:
        noise = noise.mean(axis=0) * np.sqrt(len(noise)) + 0.15 * noise
    if noise.ndim == 1:
        return 0.3 * noise if name.endswith(".bias") else 1 + 0.2 * noise
    size = 0.6 if name.startswith(("token_embd", "output.")) else 1.2
    if re.search(r"(attn_output|ffn_down(_exps|_shexp)?|ssm_out|out_proj)\.weight$", name):
        size = 0.1
    return np.float32(size / np.sqrt(noise.shape[-1])) * noise


def write(
    path: Path, recipe: Recipe, file_type: GGMLQuantizationType = GGMLQuantizationType.F16
) -> Path:
    """Write the recipe's model; matrices in ``file_type`` where their rows fit, the rest in F32.

    As in real files, vectors, routers (ffn_gate_inp) and small convolution and state-space tensors
    are F32.
    """
    writer = gguf.GGUFWriter(path, recipe.architecture)
    keys = {f"{recipe.architecture}.{key}": value for key, value in recipe.keys.items()}
    for key, value in {**keys, **tokenizer_keys(), **recipe.more}.items():
        kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING", list: "ARRAY"}
        kind = GGUFValueType[kinds[type(value)]]
        if isinstance(value, list):
            inner = {bool: "BOOL", int: "INT32", float: "FLOAT32", str: "STRING"}[type(value[0])]
            writer.add_key_value(key, value, kind, sub_type=GGUFValueType[inner])
        else:
            writer.add_key_value(key, value, kind)
    for name, shape in recipe.tensors.items():
        noise = np.random.default_rng([recipe.seed, zlib.crc32(name.encode())])
        sample = noise.standard_normal(shape, dtype=np.float32)
        values = recipe.values(name, sample) if recipe.values else None
        values = usual_values(name, sample) if values is None else values
        if name in ("token_embd.weight", "output.weight"):
            values[END] = 0
        kind = type_of(name, shape, file_type)
        data = encode(np.ascontiguousarray(values, dtype=np.float32), kind, name)
        quantized = kind not in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
        writer.add_tensor(name, data, raw_dtype=kind if quantized else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def type_of(
    name: str, shape: tuple[int, ...], file_type: GGMLQuantizationType
) -> GGMLQuantizationType:
    """The type a real file of this kind would store the tensor in."""
    small = ("ffn_gate_inp", "conv1d", "ssm_a", "ssm_d", "shortconv.conv", "_norm", "rel_b")
    if len(shape) < 2 or not name.endswith(".weight") or any(word in name for word in small):
        return GGMLQuantizationType.F32
    if shape[-1] % gguf.GGML_QUANT_SIZES[file_type][0]:
        return GGMLQuantizationType.F16
    return file_type
