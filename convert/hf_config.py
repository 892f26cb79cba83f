"""``config.json`` of a Hugging Face or MLX model folder, as mlx-lm and GGUF need to read it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from convert.errors import UserError


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json`` with the keys that transformers 5 renamed filled in.

    Raises:
        UserError: when the file is missing, is not a JSON object, or names no ``model_type``.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no config.json: name the folder of a whole MLX or Hugging Face model."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON ({error}): fetch the file again.") from None
    if not isinstance(config, dict) or not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} names no model_type: it is not the config of a language model.")
    return fill_in(config)


def fill_in(config: dict[str, Any]) -> dict[str, Any]:
    """Add what older readers look for; nothing that is there is changed or removed.

    transformers 5 keeps ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` inside
    ``rope_parameters`` (for models with two kinds of attention, one such object a kind) and writes
    ``num_experts`` as ``num_local_experts``. Readers that miss the first silently fall back to a
    default base frequency, so the filling in is not only about models that fail to load.
    """
    filled = dict(config)
    for name, value in _missing(config).items():
        filled.setdefault(name, value)
    if isinstance(config.get("text_config"), dict):
        filled["text_config"] = fill_in(config["text_config"])
    return filled


def _missing(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict):
        if isinstance(rope.get("full_attention"), dict):
            sliding = rope.get("sliding_attention")
            if isinstance(sliding, dict) and "rope_theta" in sliding:
                found["rope_local_base_freq"] = sliding["rope_theta"]
            rope = rope["full_attention"]
        if "rope_theta" in rope:
            found["rope_theta"] = rope["rope_theta"]
        for key in ("partial_rotary_factor", "original_max_position_embeddings"):
            if rope.get(key) is not None:
                found[key] = rope[key]
        if rope.get("rope_type", rope.get("type", "default")) != "default":
            scaling = {
                key: value
                for key, value in rope.items()
                if key not in ("rope_theta", "partial_rotary_factor")
            }
            scaling.setdefault("type", scaling.get("rope_type"))
            found["rope_scaling"] = scaling
    if "num_local_experts" in config:
        found["num_experts"] = config["num_local_experts"]
    return found


def refuse_foreign(folder: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse a folder that is quantized in another form than MLX's own.

    Args:
        names: of the folder's tensors.

    Raises:
        UserError: naming the folder and the mend.
    """
    if isinstance(config.get("quantization"), dict):
        return
    text = config.get("text_config")
    method: Any = config.get("quantization_config")
    if not method and isinstance(text, dict):
        method = text.get("quantization_config") or text.get("quantization")
    endings = (".scales", ".qweight", ".weight_scale", ".weight_scale_inv", "_blocks")
    packed = next((name for name in names if name.endswith(endings)), None)
    if method or packed:
        kind = method.get("quant_method") if isinstance(method, dict) else None
        raise UserError(
            f"{folder} is quantized{f' by {kind}' if kind else ''}"
            f"{f' ({packed})' if packed else ''} in another form than MLX's own: convert it first "
            f"with `mlx_lm.convert --hf-path {folder} --mlx-path {folder}-mlx`."
        )


def refuse_quantized(folder: Path, config: dict[str, Any], names: Iterable[str]) -> None:
    """Refuse a quantized folder, whose weights are read as floats here.

    Args:
        names: of the folder's tensors.

    Raises:
        UserError: naming the folder and the mend.
    """
    configured = any(
        isinstance(part, dict) and (part.get("quantization") or part.get("quantization_config"))
        for part in (config, config.get("text_config"))
    )
    packed = next((name for name in names if name.endswith((".scales", ".qweight"))), None)
    if configured or packed:
        raise UserError(
            f"{folder} is quantized{f' ({packed})' if packed else ''}, and quantized weights are "
            "not supported as a source here: take the float model it was made from, or dequantize "
            f"it first with `mlx_lm.convert --hf-path {folder} -d --mlx-path {folder}-float`."
        )
