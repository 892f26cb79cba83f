"""Sparse autoencoders for tests: written in each format, and encoded in float64, by NumPy alone."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np

Weights = dict[str, np.ndarray]


def weights(architecture: str, *, width: int, count: int, seed: int) -> Weights:
    """Random weights by SAELens' names, float32."""
    random = np.random.default_rng(seed)

    def some(*shape: int) -> np.ndarray:
        return (random.normal(size=shape) * 0.3).astype(np.float32)

    made = {"W_enc": some(width, count), "W_dec": some(count, width), "b_dec": some(width)}
    if architecture == "gated":
        return {**made, "b_gate": some(count), "b_mag": some(count), "r_mag": some(count)}
    made["b_enc"] = some(count)
    if architecture == "jumprelu":
        made["threshold"] = np.abs(some(count)) * 2
    return made


def reference(
    weights: Weights,
    states: np.ndarray,
    architecture: str,
    *,
    k: int = 0,
    apply_b_dec_to_input: bool = True,
    normalize_activations: str = "none",
) -> np.ndarray:
    """Activations in float64, row by row and feature by feature."""
    w = {name: one.astype(np.float64) for name, one in weights.items()}
    rows = []
    for x in states.astype(np.float64):
        if normalize_activations == "layer_norm":
            x = x - np.mean(x)
            x = x / (np.std(x, ddof=1) + 1e-5)
        elif normalize_activations == "constant_norm_rescale":
            x = x * np.sqrt(len(x)) / np.linalg.norm(x)
        if apply_b_dec_to_input:
            x = x - w["b_dec"]
        row = []
        for f in range(w["W_enc"].shape[1]):
            along = float(x @ w["W_enc"][:, f])
            if architecture == "gated":
                inside = along + w["b_gate"][f] > 0
                row.append(max(0.0, along * np.exp(w["r_mag"][f]) + w["b_mag"][f]) * inside)
            elif architecture == "jumprelu":
                pre = along + w["b_enc"][f]
                row.append(max(0.0, pre) if pre > w["threshold"][f] else 0.0)
            else:
                row.append(along + w["b_enc"][f])
        if architecture == "topk":
            least = sorted(row)[-k]
            row = [one if one >= least else 0.0 for one in row]
        rows.append([max(0.0, one) for one in row])
    return np.array(rows)


def write_saelens(
    folder: Path, weights: Weights, architecture: str, *, k: int = 0, layer: int = 2, **how: Any
) -> Path:
    """A folder as version 6 of SAELens writes it."""
    width, count = weights["W_enc"].shape
    config = {
        "d_in": width, "d_sae": count, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"sae_lens_version": "6.0.0", "hook_name": f"blocks.{layer}.hook_resid_post"},
        "architecture": architecture, **({"k": k} if architecture == "topk" else {}), **how,
    }  # fmt: skip
    return write_folder(folder, weights, config)


def write_folder(folder: Path, weights: Weights, config: dict[str, Any]) -> Path:
    """A folder with cfg.json and sae_weights.safetensors."""
    folder.mkdir(parents=True)
    (folder / "cfg.json").write_text(json.dumps(config))
    write_safetensors(folder / "sae_weights.safetensors", weights)
    return folder


def write_gemma_scope(folder: Path, weights: Weights, form: str) -> Path:
    """A folder of Gemma Scope (npz), or of Gemma Scope 2 (safetensors)."""
    folder.mkdir(parents=True)
    if form == "npz":
        np.savez(folder / "params.npz", **weights)
        return folder
    lower = {name.lower(): one for name, one in weights.items()}
    write_safetensors(folder / "params.safetensors", lower)
    config = {"architecture": "jump_relu", "hf_hook_point_in": "model.layers.3.output"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_safetensors(path: Path, tensors: Weights) -> None:
    """A safetensors file: the length of its header, the header, and the bytes."""
    header, data = {}, b""
    for name, one in tensors.items():
        raw = np.ascontiguousarray(one, "<f4").tobytes()
        places = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(one.shape), "data_offsets": places}
        data += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
