"""The demo with experts: each layer's MLP twice, behind a router (sparse upcycling).

Both experts of a layer are the layer's MLP, and a token's weights add up to 1. So the model answers
as the demo does, whatever its routers choose, and refusals are written by experts.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx

from abl_mlx.demo import MODEL_PATH

LAYERS, EXPERTS = 4, 2

_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def write(folder: Path) -> Path:
    """Write it as a folder of the architecture Mixtral, in float16."""
    folder.mkdir()
    for file in MODEL_PATH.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = json.loads((MODEL_PATH / "config.json").read_text())
    config |= {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "tie_word_embeddings": False,
        "sliding_window": None,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    weights: dict[str, mx.array] = {}
    for file in MODEL_PATH.glob("*.safetensors"):
        for name, value in mx.load(str(file)).items():
            layer, _, matrix = name.partition(".mlp.")
            if not matrix:
                weights[name] = value
                continue
            block, which = f"{layer}.block_sparse_moe", _NAMES[matrix.split(".")[0]]
            for expert in range(EXPERTS):
                weights[f"{block}.experts.{expert}.{which}.weight"] = value
    width = config["hidden_size"]
    for layer in range(LAYERS):
        gate = 0.1 * mx.random.normal((EXPERTS, width), key=mx.random.key(layer))
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        weights[name] = gate.astype(mx.float16)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder
