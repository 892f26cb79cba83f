"""LoRA adapters for mlx-lm and llama.cpp: low-rank changes beside weights that stay as they are.

A change of a weight W is scale · left @ right. mlx-lm reads a folder of adapter_config.json and
adapters.safetensors (mlx_lm/tuner/utils.py, load_adapters), llama.cpp a GGUF of general.type
"adapter" (src/llama-adapter.cpp). Both compute W x and the change of it separately, so a quantized
base keeps its bytes. Factors are float32 in both: what a runtime does not round away it applies.
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
"""How the names of the two formats end here."""


def is_mlx(path: Path) -> bool:
    """Whether a name is that of an mlx-lm adapter."""
    return ends_in(path, SUFFIX)


def is_lora(path: Path) -> bool:
    """Whether a name is that of a LoRA of llama.cpp's."""
    return ends_in(path, GGUF_SUFFIX)


@dataclass(frozen=True)
class LowRank:
    """The change of one weight, but for the adapter's scale: left @ right.

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
        """Shape of the weight that is changed."""
        return (*self.left.shape[:-1], self.right.shape[-1])

    @property
    def nbytes(self) -> int:
        """Of both factors."""
        return self.left.nbytes + self.right.nbytes


@dataclass(frozen=True)
class Adapter:
    """What an adapter file holds.

    Attributes:
        scale: by which every change is multiplied.
        changes: module path (MLX) or tensor name (GGUF) of the weight -> its change.
    """

    scale: float
    changes: dict[str, LowRank]

    @property
    def rank(self) -> int:
        """k, the same for all changes.

        Raises:
            UserError: when there are none, or they differ: the formats hold one rank and scale.
        """
        ranks = {one.rank for one in self.changes.values()}
        if len(ranks) != 1:
            raise UserError("an adapter needs changes of one and the same rank.")
        return ranks.pop()


# --- mlx-lm ------------------------------------------------------------------------------------


def write_mlx(folder: Path, adapter: Adapter, label: Mapping[str, Any] | None = None) -> None:
    """Write the two files of an mlx-lm adapter into an existing folder.

    ``num_layers`` is 0 and ``keys`` hold whole paths: mlx-lm looks for keys first inside each
    layer, by paths relative to it, where none of these is, and then in the whole model.

    Args:
        label: what adapter_config.json says under the key ``abl_mlx``; mlx-lm does not look at it.
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
    """Read back an adapter folder.

    Args:
        kinds: module path -> kind of the weight, which the files do not tell.

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
    """lora_a and lora_b as mlx_lm/tuner/lora.py multiplies them."""
    if one.kind == "linear":  # x @ lora_a @ lora_b
        return one.right.T, one.left.T
    if one.kind == "experts":  # x @ lora_aᵀ @ lora_bᵀ of the chosen experts
        return one.right, one.left
    return one.left, one.right  # lora_a[tokens] @ lora_b


# --- llama.cpp ---------------------------------------------------------------------------------


def write_gguf(
    path: Path, architecture: str, adapter: Adapter, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write a LoRA that llama.cpp applies.

    llama.cpp multiplies by adapter.lora.alpha / rank, so alpha is scale · rank.

    Args:
        architecture: that of the base file, or llama.cpp refuses it.
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
            raise UserError(f"the tensor name {name} is too long for an adapter of it.")
        for suffix, values in zip((".lora_a", ".lora_b"), _gguf_factors(name, one), strict=True):
            writer.add_tensor(name + suffix, values.astype(np.float32, order="C"))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# ggml keeps 64 bytes for a name, the last of them zero.
_LONGEST = 63


def _alpha(path: Path, value: Any) -> float:
    kind = number()
    if not kind.fits(value):
        raise UserError(f"{path}: its adapter.lora.alpha must be {kind.says}, not {shown(value)}.")
    return float(value)


def read_gguf(path: Path) -> Adapter:
    """Read back a LoRA of llama.cpp's.

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
    """The tensors to which llama.cpp would not apply an adapter."""
    stream = STREAMS.get(architecture)
    roles = frozenset() if stream is None else stream.past_adapters
    return [name for name in names if roles & set(name.split("."))]


def is_embedding(name: str) -> bool:
    """Whether llama.cpp takes an adapter of this tensor for one of its token embedding."""
    return name.endswith("token_embd.weight")


def _gguf_factors(name: str, one: LowRank) -> tuple[np.ndarray, np.ndarray]:
    """lora_a and lora_b in NumPy's order."""
    if is_embedding(name):  # flipped: rows of lora_a are looked up
        return one.left, one.right.T
    return one.right, one.left
