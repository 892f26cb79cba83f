"""LoRA adapters for mlx-lm and llama.cpp: low-rank changes in a file beside unchanged weights.

The change of a weight W is scale · left @ right. mlx-lm reads a folder with adapter_config.json and
adapters.safetensors (mlx_lm/tuner/utils.py, load_adapters), llama.cpp a GGUF of general.type
"adapter" (src/llama-adapter.cpp). Both compute W x and its change separately, so a quantized base
model keeps its bytes. The factors are float32 in both formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import numpy as np

from convert.architectures.table import STREAMS
from convert.base import json_text
from convert.base.errors import UserError
from convert.base.schema import TEXT, list_of, number, record, shown
from convert.base.suffixes import ends_in
from convert.gguf.file import GgufSource
from convert.gguf.values import value_type

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"

SUFFIX, GGUF_SUFFIX = ".adapter", ".lora.gguf"
"""The suffixes that this project gives adapters of mlx-lm and of llama.cpp."""


def is_mlx(path: Path) -> bool:
    """Whether a path is named like an mlx-lm adapter; it need not exist."""
    return ends_in(path, SUFFIX)


def is_lora(path: Path) -> bool:
    """Whether a path is named like a LoRA file for llama.cpp; it need not exist."""
    return ends_in(path, GGUF_SUFFIX)


@dataclass(frozen=True)
class LowRank:
    """The change of one weight before the adapter's scale: left @ right.

    Attributes:
        kind: ``linear`` (W is (out, in)), ``experts`` ((E, out, in)) or ``embedding`` ((V, d)).
        left: float32 (out, k), (E, out, k) or (V, k).
        right: float32 (k, in), (E, k, in) or (k, d).
    """

    kind: str
    left: np.ndarray
    right: np.ndarray

    @property
    def rank(self) -> int:
        """k."""
        return int(self.left.shape[-1])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight that is changed."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def nbytes(self) -> int:
        """The bytes of both factors."""
        return self.left.nbytes + self.right.nbytes


@dataclass(frozen=True)
class Adapter:
    """The contents of an adapter.

    Attributes:
        scale: the factor of every change.
        changes: module path (MLX) or tensor name (GGUF) of the weight -> its change.
    """

    scale: float
    changes: dict[str, LowRank]

    @property
    def rank(self) -> int:
        """k, the rank of every change.

        Raises:
            UserError: when there are no changes, or their ranks differ: both formats hold one rank.
        """
        ranks = {one.rank for one in self.changes.values()}
        if len(ranks) != 1:
            raise UserError("an adapter needs changes that all have the same rank.")
        return ranks.pop()


# --- mlx-lm ------------------------------------------------------------------------------------


def write_mlx(folder: Path, adapter: Adapter, label: Mapping[str, Any] | None = None) -> None:
    """Write the two files of an mlx-lm adapter into an existing folder.

    ``num_layers`` is 0 and ``keys`` are paths from the model's root. mlx-lm looks for keys first
    inside each layer, by paths from that layer, and finds none; then in the whole model.

    Args:
        folder: an existing folder.
        adapter: what to write.
        label: a value for the key ``abl_mlx`` of adapter_config.json, which mlx-lm ignores.
    """
    config = {
        "fine_tune_type": "lora",
        "num_layers": 0,
        "lora_parameters": {
            "rank": adapter.rank,
            "scale": adapter.scale,
            "dropout": 0.0,
            "keys": list(adapter.changes),
        },
        **({"abl_mlx": dict(label)} if label else {}),
    }
    tensors = {}
    for path, one in adapter.changes.items():
        first, second = _mlx_factors(one)
        tensors[f"{path}.lora_a"] = mx.array(first)
        tensors[f"{path}.lora_b"] = mx.array(second)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    mx.save_safetensors(str(folder / WEIGHTS), tensors, {"format": "mlx"})


_CONFIG = record({}, {"lora_parameters": record({}, {"scale": number(), "keys": list_of(TEXT)})})


def read_mlx(folder: Path, kinds: Mapping[str, str]) -> Adapter:
    """Read a folder of an mlx-lm adapter.

    Args:
        folder: the folder.
        kinds: module path -> kind of the weight (as in `LowRank`), which the files do not say.

    Raises:
        UserError: when the folder is no such adapter, or lacks a factor.
    """
    try:
        config = json_text.read(folder / CONFIG, _CONFIG)["lora_parameters"]
        scale, keys = float(config["scale"]), list(config["keys"])
        tensors = mx.load(str(folder / WEIGHTS))
        found = {
            path: (tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"])  # type: ignore[call-overload]
            for path in keys
        }
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise UserError(f"{folder} is no LoRA adapter of mlx-lm's: {error}.") from None
    changes = {}
    for path, (first, second) in found.items():
        kind = kinds[path]
        left, right = {
            "linear": lambda a, b: (b.T, a.T),
            "experts": lambda a, b: (b, a),
            "embedding": lambda a, b: (a, b),
        }[kind](first, second)
        changes[path] = LowRank(
            kind, np.array(left.astype(mx.float32)), np.array(right.astype(mx.float32))
        )
    return Adapter(scale, changes)


def _mlx_factors(one: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """lora_a and lora_b in the shapes in which mlx_lm/tuner/lora.py multiplies them."""
    if one.kind == "linear":  # x @ lora_a @ lora_b
        return one.right.T, one.left.T
    if one.kind == "experts":  # x @ lora_aᵀ @ lora_bᵀ of the chosen experts
        return one.right, one.left
    return one.left, one.right  # lora_a[tokens] @ lora_b


# --- llama.cpp ---------------------------------------------------------------------------------


def write_gguf(
    path: Path, architecture: str, adapter: Adapter, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a LoRA file for llama.cpp.

    llama.cpp multiplies by adapter.lora.alpha / rank, so alpha is scale · rank.

    Args:
        path: the file to write.
        architecture: the base file's general.architecture; llama.cpp refuses any other.
        adapter: what to write.
        metadata: further keys and values.

    Raises:
        UserError: when a name is too long for the format.
    """
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("general.type", "adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.scale * adapter.rank)
    for key, value in (metadata or {}).items():
        kind, inner = value_type(key, value)
        writer.add_key_value(key, value, kind, sub_type=inner)
    for name, one in adapter.changes.items():
        if len(name.encode()) + len(".lora_a") > _LONGEST:
            raise UserError(f"the tensor name {name} is too long for an adapter file.")
        for suffix, values in zip((".lora_a", ".lora_b"), _gguf_factors(name, one), strict=True):
            writer.add_tensor(name + suffix, values.astype(np.float32, order="C"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# Longest name of a tensor in bytes: ggml keeps 64, the last of which is zero.
_LONGEST = 63


def _alpha(path: Path, value: Any) -> float:
    kind = number()
    if not kind.fits(value):
        raise UserError(f"{path}: its adapter.lora.alpha must be {kind.says}, not {shown(value)}.")
    return float(value)


def read_gguf(path: Path) -> Adapter:
    """Read a LoRA file for llama.cpp.

    Raises:
        UserError: when the file is no GGUF or no LoRA.
    """
    with GgufSource(path) as file:
        if file.metadata.get("adapter.type") != "lora":
            raise UserError(f"{path} is no LoRA adapter: its adapter.type is not lora.")
        changes = {}
        for entry in file.tensors:
            if not entry.endswith(".lora_a"):
                continue
            name = entry.removesuffix(".lora_a")
            first, second = file.values(entry), file.values(f"{name}.lora_b")
            if is_embedding(name):
                changes[name] = LowRank("embedding", first, second.T)
            else:
                kind = "experts" if first.ndim == 3 else "linear"
                changes[name] = LowRank(kind, second, first)
        alpha = _alpha(path, file.metadata.get("adapter.lora.alpha"))
    adapter = Adapter(alpha, changes)
    return Adapter(alpha / adapter.rank, changes)


def ignored(architecture: str, names: Iterable[str]) -> list[str]:
    """Those of the tensors ``names`` to which llama.cpp would not apply an adapter."""
    stream = STREAMS.get(architecture)
    roles = frozenset() if stream is None else stream.past_adapters
    return [name for name in names if roles & set(name.split("."))]


def is_embedding(name: str) -> bool:
    """Whether llama.cpp treats an adapter of this tensor as one of the token embedding."""
    return name.endswith("token_embd.weight")


def _gguf_factors(name: str, one: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """lora_a and lora_b with their dimensions in NumPy's order."""
    if is_embedding(name):  # the other way round: llama.cpp looks up rows of lora_a
        return one.left, one.right.T
    return one.right, one.left
