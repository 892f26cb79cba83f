"""Makes config.json for mlx-lm from a GGUF's metadata: the parts that several families share."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from convert.architectures.config_keys import SHARED
from convert.architectures.keys import MISSING, Keys
from convert.base.errors import UserError


def base_config(keys: Keys, model_type: str) -> dict[str, Any]:
    """The keys of config.json that nearly every model has."""
    heads = keys.count(SHARED["num_attention_heads"])
    width = keys.count(SHARED["hidden_size"])
    config = {
        "model_type": model_type,
        "hidden_size": width,
        "num_hidden_layers": keys.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": keys.integer(SHARED["num_key_value_heads"], heads),
        "head_dim": keys.integer(SHARED["head_dim"], width // heads),
        "vocab_size": keys.vocabulary,
        "max_position_embeddings": keys.integer(SHARED["max_position_embeddings"]),
        "rope_theta": keys.number(SHARED["rope_theta"], 10000.0),
        "tie_word_embeddings": keys.tied,
    }
    if SHARED["rms_norm_eps"] in keys:
        config["rms_norm_eps"] = short(keys.number(SHARED["rms_norm_eps"]))
    inner = keys.get(SHARED["intermediate_size"])
    if isinstance(inner, int) or (isinstance(inner, list) and len(set(inner)) == 1):
        config["intermediate_size"] = keys.integer(SHARED["intermediate_size"])
    return config


def short(value: float) -> float:
    """The number whose decimal form is the shortest for a float32: 1e-05, not 9.99e-06."""
    return float(str(np.float32(value)))


def unsupported(keys: Keys, why: str) -> UserError:
    """The error to raise for a file that cannot be run; ``why`` follows its name in the message."""
    return UserError(f"{keys.source.parts[0]} {why}: this file cannot be run with MLX.")


def rotary_factor(keys: Keys) -> float:
    """The share of a head's dimensions that is rotated; int(head * share) is exact.

    Raises:
        UserError: when the number of rotated dimensions is odd or larger than the head.
    """
    head, rotated = _rotated(keys)
    share = float(rotated / head)
    return share if int(head * share) == rotated else (rotated + 0.5) / head


def _rotated(keys: Keys) -> tuple[int, int]:
    """The number of dimensions of a head, and how many of them are rotated."""
    head = keys.count(
        "attention.key_length",
        keys.integer("embedding_length") // keys.count("attention.head_count"),
    )
    rotated = keys.integer("rope.dimension_count", head)
    if not 2 <= rotated <= head or rotated % 2:
        raise UserError(
            f"{keys.source.parts[0]} rotates {rotated} of the {head} dimensions of each head: get "
            "the file again."
        )
    return head, rotated


def sliding_window(keys: Keys, default: Any = MISSING) -> int:
    """The value of attention.sliding_window in tokens, at least 1."""
    return int(keys.count("attention.sliding_window", default))


def whole_rotary(keys: Keys) -> None:
    """For a model of mlx-lm that rotates all dimensions of a head: check that the file does, too.

    Raises:
        UserError: when the file rotates only a part of each head.
    """
    if rotary_factor(keys) != 1.0:
        raise unsupported(
            keys,
            f"rotates {keys.integer('rope.dimension_count')} dimensions of each head, but mlx-lm's "
            f"model for {keys.architecture} rotates all of them",
        )


def unscaled_rotary(keys: Keys) -> None:
    """For a model of mlx-lm without rope scaling: check that the file needs none.

    Raises:
        UserError: when the file scales its rotary embedding.
    """
    if rope_scaling(keys) is not None:
        raise unsupported(
            keys,
            f"stretches its rotary embedding, which mlx-lm's model for {keys.architecture} does "
            "not do",
        )


def experts_used(keys: Keys) -> int:
    """The value of expert_used_count, from 1 to the number of experts."""
    used, count = keys.count("expert_used_count"), keys.count("expert_count")
    if used > count:
        raise UserError(
            f"{keys.source.parts[0]} asks for {used} of {count} experts: get the file again."
        )
    return int(used)


def sliding_layers(keys: Keys, period: int) -> list[bool]:
    """For each layer, whether its attention is limited to attention.sliding_window tokens.

    Newer files have an array with one value for each layer. A single number n (or ``period`` where
    the key is missing) means that every n-th layer attends to the whole context.
    """
    pattern = keys.get("attention.sliding_window_pattern", period)
    if isinstance(pattern, list):
        return [bool(one) for one in keys.per_layer("attention.sliding_window_pattern")]
    count = keys.integer("attention.sliding_window_pattern", period)
    return [count == 0 or layer % count < count - 1 for layer in range(keys.layers)]


def rope_scaling(keys: Keys) -> dict[str, Any] | None:
    """The rope_scaling of config.json: None, linear, yarn, or llama3 from the table of factors.

    Raises:
        UserError: when the file's kind of scaling has no counterpart in mlx-lm.
    """
    base = keys.number("rope.freq_base", 10000.0)
    if base <= 1.0:
        raise UserError(
            f"{keys.source.parts[0]} has {keys.architecture}.rope.freq_base = {base:g}: get the "
            "file again."
        )
    kind = keys.get("rope.scaling.type", "linear")
    factor = keys.number("rope.scaling.factor", keys.number("rope.scale_linear", 0.0)) or 1.0
    factor = 1.0 if kind == "none" else short(factor)
    attention = keys.number("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear", "yarn"):
        raise unsupported(
            keys,
            f"stretches its rotary embedding by the method {kind!r}, which mlx-lm does not have "
            f"for {keys.architecture}",
        )
    if attention != 1.0 and (kind != "yarn" or factor <= 1.0):
        raise unsupported(
            keys,
            f"multiplies its rotary embedding by {attention:g} (rope.scaling.attn_factor) without "
            "stretching it by yarn, which mlx-lm cannot do",
        )
    if "rope_freqs.weight" in keys.tensors:
        if factor != 1.0:
            raise unsupported(
                keys,
                f"stretches its rotary embedding twice, by rope_freqs.weight and by the method "
                f"{kind!r}, of which mlx-lm can do one only",
            )
        return _llama3_scaling(keys)
    if factor == 1.0:
        return None
    if kind == "linear":
        return {"type": "linear", "rope_type": "linear", "factor": factor}
    scaling = {
        "type": "yarn",
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": keys.integer("rope.scaling.original_context_length", 0)
        or keys.integer("context_length"),
    }
    if attention != 1.0:
        # llama.cpp multiplies by attention * (1 + grown), mlx-lm by 1 + mscale * grown.
        grown = 0.1 * math.log(factor)
        scaling["mscale"] = (attention * (1 + grown) - 1) / grown
    return scaling


def _llama3_scaling(keys: Keys) -> dict[str, Any] | None:
    """The parameters of llama3 scaling that give the file's table of factors.

    This is the inverse of `hf_metadata.extra_tensors`. A wave of length w has the factor
    1 / ((1 - s) / f + s), where s = clip((c / w - low) / (high - low), 0, 1). Only c / low and
    c / high can be found from the factors, so c is taken to be the usual 8192.
    """
    factors = keys.values("rope_freqs.weight").astype(np.float64).reshape(-1)
    refusal = unsupported(
        keys,
        "has a rope_freqs.weight that is no table of llama3's kind, which is the only one mlx-lm "
        "can run",
    )
    if len(factors) != _rotated(keys)[1] // 2 or not np.all(np.isfinite(factors) & (factors > 0)):
        raise refusal
    base = keys.number("rope.freq_base", 10000.0)
    context, largest = 8192, float(np.round(factors.max(), 4))
    waves = 2 * np.pi * base ** (np.arange(len(factors)) / len(factors))
    if np.all(factors == 1.0):
        return None
    if largest <= 1.0:
        low, high = 1.0, 4.0
    else:
        share = (1 / factors - 1 / largest) / (1 - 1 / largest)
        blended = (share > 1e-4) & (share < 1 - 1e-4)
        if blended.sum() >= 2:
            # share = slope * (c / w) - low * slope
            slope, intercept = np.polyfit(context / waves[blended], share[blended], 1)
            low, high = -intercept / slope, (1 - intercept) / slope
        else:
            stretched = context / waves[factors > (1 + largest) / 2]
            kept = context / waves[factors <= (1 + largest) / 2]
            low = float(stretched.max()) if len(stretched) else 1.0
            high = float(kept.min()) if len(kept) else 4.0
            if blended.any():
                # With a single blended point, any line through it will do that leaves the others.
                at, value = (context / waves[blended])[0], share[blended][0]
                low = max(low if len(stretched) else 0.0, (at - value * high) / (1 - value))
                high = low + (at - low) / value
        low, high = float(np.round(low, 4)), float(np.round(high, 4))
    scaling = {
        "type": "llama3",
        "rope_type": "llama3",
        "factor": largest,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": context,
    }
    share = np.clip((context / waves - low) / (high - low), 0.0, 1.0)
    made = 1 / ((1 - share) / largest + share)
    if not np.all(np.abs(made / factors - 1) < 2e-3):
        raise refusal
    return scaling
