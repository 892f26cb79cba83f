"""Audits a model of 8 billion weights on a Hugging Face on this machine, and says what was read.

The repository is Llama-3.1-8B's shape in bfloat16 (16 GB) with random weights, which are made when
they are asked for; nothing of that size is stored. A direction is removed from all layers, at
strength 1 or 0.7, or from half of them, or from none.

    python benchmarks/remote_audit.py
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import threading
import time
import zlib
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.support.hub_server import Hub, serve

REPOSITORY = "some/llama-8b"
D, FF, KV, LAYERS, VOCABULARY = 4096, 14336, 1024, 32, 128256
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D,
    "intermediate_size": FF, "num_hidden_layers": LAYERS, "num_attention_heads": 32,
    "num_key_value_heads": 8, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, D)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}"
        found[f"{at}.input_layernorm.weight"] = (D,)
        found[f"{at}.mlp.down_proj.weight"] = (D, FF)
        found[f"{at}.mlp.gate_proj.weight"] = (FF, D)
        found[f"{at}.mlp.up_proj.weight"] = (FF, D)
        found[f"{at}.post_attention_layernorm.weight"] = (D,)
        found[f"{at}.self_attn.k_proj.weight"] = (KV, D)
        found[f"{at}.self_attn.o_proj.weight"] = (D, D)
        found[f"{at}.self_attn.q_proj.weight"] = (D, D)
        found[f"{at}.self_attn.v_proj.weight"] = (KV, D)
    return found | {"model.norm.weight": (D,), "lm_head.weight": (VOCABULARY, D)}


@dataclass
class Shards:
    """One safetensors file whose tensors are made when they are read."""

    strength: float
    edited: range
    size: int = field(init=False)

    def __post_init__(self) -> None:
        offset, entries = 0, {}
        for name, shape in shapes().items():
            nbytes = 2 * int(np.prod(shape))
            entries[name] = {
                "dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + nbytes],
            }  # fmt: skip
            offset += nbytes
        header = json.dumps(entries).encode()
        header += b" " * (-len(header) % 8)
        self.header = len(header).to_bytes(8, "little") + header
        self.entries, self.size = entries, len(self.header) + offset
        self._made = lru_cache(maxsize=2)(self._tensor)
        self._lock = threading.Lock()

    @cached_property
    def direction(self) -> np.ndarray:
        found = np.random.default_rng(0).standard_normal(D).astype(np.float32)
        return found / np.linalg.norm(found)

    def read(self, start: int, end: int) -> bytes:
        found = self.header[start:end]
        at = len(self.header)
        for name, entry in self.entries.items():
            first, last = (at + one for one in entry["data_offsets"])
            low, high = max(start, first), min(end, last)
            if low < high:
                found += self.tensor(name)[low - first : high - first]
        return found

    def tensor(self, name: str) -> bytes:
        """The bytes of a tensor, made once for requests that follow each other."""
        with self._lock:
            return self._made(name)

    def _tensor(self, name: str) -> bytes:
        """The tensor in bfloat16; of the embedding and the head the first rows, then zeros."""
        shape = shapes()[name]
        if len(shape) == 1:
            return np.full(shape, 0x3F80, "<u2").tobytes()
        rows = min(shape[0], 2 * D)
        random = np.random.default_rng(zlib.crc32(name.encode()))
        # Rows of different sizes, as in real models.
        scale = np.exp(0.4 * np.random.default_rng(1).standard_normal(D)).astype(np.float32)
        weight = random.standard_normal((rows, shape[1]), dtype=np.float32) * 0.02
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        weight *= scale[:, None] if writes else 1
        if name.startswith("model.embed"):
            weight *= scale
            weight -= self.strength * np.outer(weight @ self.direction, self.direction)
        elif writes and int(name.split(".")[2]) in self.edited:
            weight -= self.strength * np.outer(self.direction, self.direction @ weight)
        bits = weight.view(np.uint32)
        rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
        return rounded + bytes(2 * (shape[0] - rows) * shape[1])


CASES = {
    "strength 1": (1.0, range(LAYERS)),
    "strength 0.7": (0.7, range(LAYERS)),
    "strength 1, layers 10-25": (1.0, range(10, 26)),
    "not edited": (0.0, range(0)),
}


def main() -> None:
    wanted = sys.argv[1:] or list(CASES)
    print("| edit | verdict | \\|cos\\| | strength | read | of | share | requests | CPU s |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name in wanted:
        shards = Shards(*CASES[name])
        files = {f"{REPOSITORY} config.json": json.dumps(CONFIG).encode()}
        hub = Hub({REPOSITORY: ["config.json", "model.safetensors"]}, files)
        hub.generated[f"{REPOSITORY} model.safetensors"] = shards
        with serve(hub), tempfile.TemporaryDirectory() as home:
            os.environ["XDG_CACHE_HOME"] = home
            print(row(name, hub, shards, Path(home)), flush=True)


def row(name: str, hub: Hub, shards: Shards, home: Path) -> str:
    from huggingface_hub import constants

    from abl_mlx.commands.audit import audit
    from abl_mlx.directions import direction_file

    constants.ENDPOINT = hub.url
    constants.HUGGINGFACE_CO_URL_TEMPLATE = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    out = home / "found.safetensors" if shards.strength else None
    begun = time.process_time()
    found = audit(f"hf:{REPOSITORY}", output=out)
    seconds = time.process_time() - begun
    cosine = ""
    if out is not None:
        recovered = np.asarray(direction_file.read(out).selected)
        cosine = f"{np.linalg.norm(recovered @ shards.direction):.4f}"
    strength = found.weights.strength
    (part,) = found.parts_read or []
    return (
        f"| {name} | {found.verdict} | {cosine} | {'' if strength is None else f'{strength:.2f}'} "
        f"| {part.read / 1e6:.0f} MB | {part.total / 1e9:.2f} GB | {part.share:.2%} "
        f"| {len(hub.asked)} | {seconds:.0f} |"
    )


if __name__ == "__main__":
    main()
