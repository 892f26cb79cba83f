"""``config.json`` of a Hugging Face or MLX model folder, as mlx-lm and GGUF need to read it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.base import hf_counts, json_text
from convert.base.errors import UserError
from convert.base.schema import (
    FLAG,
    NULL,
    OBJECT,
    TEXT,
    Kind,
    either,
    list_of,
    number,
    record,
    text,
    whole,
)

_COUNT = whole(0)
# Some architectures give a list of such counts, one for each layer.
_COUNTS = either(_COUNT, list_of(either(_COUNT, NULL)))
_FEW = whole(0, 4096)
_FRACTION = number(0, 1)
_POSITIVE = number(0, open_end=True)
_POSITIVES = either(_POSITIVE, list_of(_POSITIVE))
_LAYERS = whole(1, 1 << 16)
_TOKENS = either(whole(-1), list_of(whole(-1)))

_QUANTIZED = {"group_size": whole(1), "bits": whole(1, 32), "mode": TEXT}
_ROPE = record(
    {
        **dict.fromkeys(("type", "rope_type"), TEXT),
        **dict.fromkeys(("factor", "low_freq_factor", "high_freq_factor", "rope_theta"), _POSITIVE),
        **dict.fromkeys(("beta_fast", "beta_slow", "mscale", "mscale_all_dim"), number()),
        **dict.fromkeys(("short_factor", "long_factor"), _POSITIVES),
        "original_max_position_embeddings": whole(1),
        "partial_rotary_factor": _FRACTION,
    }
)

_KEYS: dict[str, Kind] = {
    **dict.fromkeys(("hidden_size", "vocab_size", "head_dim", "max_position_embeddings"), whole(1)),
    **dict.fromkeys(hf_counts.LAYERS, _LAYERS),
    **dict.fromkeys(
        (
            *("num_attention_heads", "num_key_value_heads", "intermediate_size"),
            *("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"),
            "moe_intermediate_size",
        ),
        _COUNTS,
    ),
    **dict.fromkeys(
        ("num_nextn_predict_layers", "num_loops", "altup_num_inputs", "o_groups"), _FEW
    ),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon"), _FRACTION),
    **dict.fromkeys(("rope_theta", "rope_local_base_freq"), _POSITIVES),
    **dict.fromkeys(
        (
            *("attn_logit_softcapping", "final_logit_softcapping", "attention_multiplier"),
            *("embedding_multiplier", "residual_multiplier", "logits_scaling"),
        ),
        number(),
    ),
    **dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _TOKENS),
    **dict.fromkeys(("tie_word_embeddings", "norm_topk_prob", "rope_traditional"), FLAG),
    "query_pre_attn_scalar": _POSITIVE,
    "partial_rotary_factor": _FRACTION,
    "original_max_position_embeddings": whole(1),
    "rope_scaling": _ROPE,
    "rope_parameters": OBJECT,
    "sliding_window": whole(-1),
    **dict.fromkeys(("sliding_window_pattern", "_sliding_window_pattern"), either(whole(0), TEXT)),
    "layer_types": list_of(TEXT),
    "architectures": either(TEXT, list_of(TEXT)),
    "quantization": record(
        _QUANTIZED, rest=either(whole(), number(), TEXT, FLAG, NULL, record(_QUANTIZED))
    ),
    "quantization_config": record({"quant_method": TEXT}),
    "abl_mlx": OBJECT,
}

_MODEL_TYPE = text(r"[\w.+-]{1,100}", "the name of an architecture")

CONFIG = record({**_KEYS, "text_config": record({**_KEYS, "model_type": _MODEL_TYPE})})
"""Types and ranges of the keys of config.json that this project reads; mlx-lm checks none."""

GENERATION = record(dict.fromkeys(("eos_token_id", "bos_token_id", "pad_token_id"), _TOKENS))
"""Types and ranges of the keys of generation_config.json that this project reads."""


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json``, checked, with keys added as `fill_in` does.

    Raises:
        UserError: as `stored_config` does.
    """
    return fill_in(stored_config(folder))


def stored_config(folder: Path) -> dict[str, Any]:
    """The folder's ``config.json`` as it is stored, checked.

    Raises:
        UserError: when the file is missing, is not a JSON object, names no ``model_type``, or has a
            value of a wrong type or out of range. A generation_config.json is checked likewise.
    """
    path = folder / "config.json"
    try:
        config = json_text.read(path, infinite=True)
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no config.json: name the folder of a whole MLX or Hugging Face model."
        ) from None
    if not isinstance(config, dict) or not _MODEL_TYPE.fits(config.get("model_type")):
        raise UserError(f"{path} names no model_type: it is not the config of a language model.")
    json_text.checked(path, config, CONFIG)
    generation = folder / "generation_config.json"
    if generation.is_file():
        json_text.read(generation, GENERATION, infinite=True)
    return config


def fill_in(config: dict[str, Any]) -> dict[str, Any]:
    """A config with the keys added that transformers before version 5 wrote; no key is changed.

    transformers 5 keeps ``rope_theta``, ``rope_scaling`` and ``partial_rotary_factor`` inside
    ``rope_parameters`` (for models with two kinds of attention, one such object for each kind) and
    writes ``num_experts`` as ``num_local_experts``. A reader that does not find ``rope_theta``
    silently takes a default base frequency, so that a model may load and still be wrong.
    """
    filled = dict(config)
    for name, value in _missing(config).items():
        filled.setdefault(name, value)
    if isinstance(config.get("text_config"), dict):
        filled["text_config"] = fill_in(config["text_config"])
    return filled


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a config ties the output head to the embedding, as transformers reads it.

    Configs of Gemma leave the key ``tie_word_embeddings`` out where it is true.
    """
    text = config.get("text_config")
    for part in (text if isinstance(text, dict) else {}, config):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    return str(config.get("model_type")).startswith("gemma")


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
