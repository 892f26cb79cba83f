"""The demo with experts: each layer's MLP several times, behind a router (sparse upcycling).

In `write` both experts of a layer are the layer's MLP, and a token's weights add up to 1. So the
model answers as the demo does, whatever its routers choose, and refusals are written by experts.
In `write_routed` two of four experts of the last two layers write the MLP's component along a
direction reversed and five times as long, and routers send tokens that are like those at the ends
of harmful prompts to the other two. So refusals depend on what routers choose.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from abl_mlx.demo import MODEL_PATH
from abl_mlx.inputs import prompts
from abl_mlx.models import chat_model
from abl_mlx.models.hooks import around
from abl_mlx.support.arrays import numpy_of

LAYERS, EXPERTS = 4, 2

_NAMES = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}

#: Of four experts in each layer of `write_routed`, those to which harmful prompts are sent.
REFUSING = (2, 3)

#: The first layer in which the other two differ from them, and routers tell prompts apart.
FIRST = 2


def write(folder: Path) -> Path:
    """Write it as a folder of the architecture Mixtral, in float16."""
    weights, matrices = _demo()
    for layer, matrix, value in matrices:
        block, which = f"{layer}.block_sparse_moe", _NAMES[matrix.split(".")[0]]
        for expert in range(EXPERTS):
            weights[f"{block}.experts.{expert}.{which}.weight"] = value
    for layer in range(LAYERS):
        gate = 0.1 * mx.random.normal((EXPERTS, _config()["hidden_size"]), key=mx.random.key(layer))
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        weights[name] = gate.astype(mx.float16)
    changes = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral",
        "num_local_experts": EXPERTS, "num_experts_per_tok": 2, "sliding_window": None,
    }  # fmt: skip
    return _written(folder, weights, changes)


def write_routed(folder: Path, direction: np.ndarray) -> Path:
    """Write it as a folder of the architecture GLM 4.5, whose routers have biases.

    Args:
        folder: the new folder.
        direction: (d,), a unit vector: the refusal direction.
    """
    weights, matrices = _demo()
    for layer, matrix, value in matrices:
        turned = value
        if matrix.startswith("down_proj") and int(layer.split(".")[-1]) >= FIRST:
            unit = mx.array(direction.astype(np.float32))
            whole = value.astype(mx.float32)
            turned = (whole - 6.0 * unit[:, None] * (unit @ whole)[None]).astype(mx.float16)
        for expert in range(4):
            given = value if expert in REFUSING else turned
            weights[f"{layer}.mlp.experts.{expert}.{matrix}"] = given
    for layer, row in enumerate(_telling_apart()):
        name = f"model.layers.{layer}.mlp.gate"
        routed = REFUSING if layer >= FIRST else ()
        rows = np.stack([row if expert in routed else 0 * row for expert in range(4)])
        weights[f"{name}.weight"] = mx.array(rows.astype(np.float16))
        weights[f"{name}.e_score_correction_bias"] = mx.array([0.0, 0.0, 0.3, 0.3])
        # The architecture has an expert for all tokens; this one writes nothing.
        for matrix in _NAMES:
            like = weights[f"model.layers.{layer}.mlp.experts.0.{matrix}.weight"]
            weights[f"model.layers.{layer}.mlp.shared_experts.{matrix}.weight"] = 0 * like
    config = _config()
    changes = {
        "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "n_routed_experts": 4,
        "num_experts_per_tok": 2, "moe_intermediate_size": config["intermediate_size"],
        "norm_topk_prob": True, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
        "routed_scaling_factor": 1.0, "first_k_dense_replace": 0, "rope_scaling": None,
        "use_qk_norm": False, "partial_rotary_factor": 1.0,
    }  # fmt: skip
    return _written(folder, weights, changes)


def _telling_apart() -> list[np.ndarray]:
    """A row (d,) for each layer: positive at what MLPs get at the ends of harmful prompts.

    It is negative at the ends of harmless ones, as far as one row tells the two apart.
    """
    chat, sets = chat_model.load(MODEL_PATH), prompts.load_demo()
    seen: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]

    def kept(layer: int) -> Any:
        def wrapper(call: Any, x: mx.array) -> Any:
            seen[layer].append(numpy_of(x)[0, -1].astype(np.float64))
            return call(x)

        return wrapper

    with around([(one.mlp, kept(layer)) for layer, one in enumerate(chat.layers)]):
        for part in (sets.harmful, sets.harmless):
            for prompt in part.train.take(24).prompts:
                mx.eval(chat.model(mx.array([chat.encode(prompt)])))
    rows = []
    for inputs in seen:
        harmful, harmless = np.mean(inputs[:24], axis=0), np.mean(inputs[24:], axis=0)
        middle, row = (harmful + harmless) / 2, harmful - harmless
        row = row - (row @ middle) / (middle @ middle) * middle
        rows.append(8 * row / (row @ (harmful - harmless)))
    return rows


def _config() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((MODEL_PATH / "config.json").read_text())
    return found


def _demo() -> tuple[dict[str, mx.array], list[tuple[str, str, mx.array]]]:
    """The demo's weights outside of MLPs, with its head apart from its embedding; and the rest.

    The rest are triples of a layer's name, a matrix's name within its MLP, and the matrix.
    """
    weights: dict[str, mx.array] = {}
    matrices = []
    for file in MODEL_PATH.glob("*.safetensors"):
        for name, value in mx.load(str(file)).items():
            layer, _, matrix = name.partition(".mlp.")
            if matrix:
                matrices.append((layer, matrix, value))
            else:
                weights[name] = value
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return weights, matrices


def _written(folder: Path, weights: dict[str, mx.array], changes: dict[str, Any]) -> Path:
    folder.mkdir()
    for file in MODEL_PATH.iterdir():
        if file.is_file() and file.suffix != ".safetensors":
            shutil.copy(file, folder)
    config = _config() | changes | {"tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "pt"})
    return folder
