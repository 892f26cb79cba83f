"""How a model's makers want it sampled: generation_config.json and the keys of a GGUF.

llama.cpp's converter writes these keys, and llama.cpp samples by them unless it is told otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from gguf import Keys

from convert.base import json_text
from convert.base.hf_config import GENERATION
from convert.gguf.values import Value

_GENERAL = Keys.General

KEYS: dict[str, tuple[str, type]] = {
    "sequence": (_GENERAL.SAMPLING_SEQUENCE, str),
    "top_k": (_GENERAL.SAMPLING_TOP_K, int),
    "top_p": (_GENERAL.SAMPLING_TOP_P, float),
    "min_p": (_GENERAL.SAMPLING_MIN_P, float),
    "xtc_probability": (_GENERAL.SAMPLING_XTC_PROBABILITY, float),
    "xtc_threshold": (_GENERAL.SAMPLING_XTC_THRESHOLD, float),
    "temperature": (_GENERAL.SAMPLING_TEMP, float),
    "penalty_last_n": (_GENERAL.SAMPLING_PENALTY_LAST_N, int),
    "penalty_repeat": (_GENERAL.SAMPLING_PENALTY_REPEAT, float),
    "mirostat": (_GENERAL.SAMPLING_MIROSTAT, int),
    "mirostat_tau": (_GENERAL.SAMPLING_MIROSTAT_TAU, float),
    "mirostat_eta": (_GENERAL.SAMPLING_MIROSTAT_ETA, float),
}
"""Names in generation_config.json, as llama.cpp's converter reads them -> GGUF key and type."""

_SMALLEST, _LARGEST = np.iinfo(np.int32).min, np.iinfo(np.int32).max


def sampling_keys(folder: Path) -> dict[str, Value]:
    """The keys ``general.sampling.*`` that a folder's generation_config.json gives.

    A value of another type than its key's is left out, because no program could sample by it.

    Args:
        folder: the model's folder.

    Raises:
        UserError: when the file is no JSON object.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    stored = json_text.read(path, GENERATION, infinite=True)
    found = {key: _fitting(stored.get(name), kind) for name, (key, kind) in KEYS.items()}
    return {key: value for key, value in found.items() if value is not None}


def generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json says of the sampling that a GGUF's metadata describe.

    A ``temperature`` of 0, which transformers refuses, becomes ``do_sample: false``; any other
    one comes with ``do_sample: true``, without which transformers ignores it.

    Args:
        metadata: GGUF key -> value.
    """
    found: dict[str, Any] = {}
    for name, (key, kind) in KEYS.items():
        value = _fitting(metadata.get(key), kind)
        if isinstance(value, float):
            value = float(str(np.float32(value)))  # the shortest that is the same float32
        if value is not None:
            found[name] = value
    if "temperature" in found:
        found["do_sample"] = found["temperature"] > 0
        if not found["do_sample"]:
            del found["temperature"]
    return found


def _fitting(value: Any, kind: type) -> Value | None:
    """A value as its key has it; None where it cannot be of this type."""
    if kind is str:
        return value if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if kind is int:
        return value if isinstance(value, int) and _SMALLEST <= value <= _LARGEST else None
    with np.errstate(over="ignore"):
        return float(value) if math.isfinite(np.float32(value)) else None
