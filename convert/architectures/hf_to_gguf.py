"""The metadata and the tensors of the GGUF file that a model folder becomes.

They follow llama.cpp's own converter and loaders (conversion/*.py, src/models/*.cpp); gguf-py's
TensorNameMap gives the names of tensors. What differs between architectures is in their entries
(`convert.architectures.table`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np

from convert.architectures.config_keys import SHARED
from convert.architectures.hf_keys import (
    Config,
    count,
    head_dim,
    kv_heads,
    original_context,
    real,
    rope_kind,
    rope_theta,
    rotary_dim,
)
from convert.architectures.table import FROM_FOLDER, Written
from convert.base.errors import UserError
from convert.base.hf_config import fill_in

_VISION = re.compile(
    r"(^|\.)(vision_tower|vision_model|multi_modal_projector|embed_vision|visual)\."
)
_SKIPPED = re.compile(rf"{_VISION.pattern}|\.rotary_emb\.(?:inv_freq|cos_cached|sin_cached)$")


def text_config(config: Config) -> dict[str, Any]:
    """The language model's part of a config.json as one flat object with mlx-lm's keys.

    Multimodal configs keep that part under text_config. Keys that transformers 5 renamed are added.
    """
    flat = dict(config)
    nested = flat.pop("text_config", None)
    if isinstance(nested, Mapping):
        kept = {key: value for key, value in nested.items() if key != "model_type"}
        flat = {**flat, **kept}
    known = FROM_FOLDER.get(str(flat.get("model_type")))
    if known is not None:
        flat = {**known.folder.defaults, **flat}
    flat = fill_in(flat)
    flat.pop("rope_parameters", None)
    return flat


def architecture(config: Config) -> Written:
    """The architecture that a folder with this config.json becomes.

    Raises:
        UserError: when the model_type is not supported, naming it and those that are.
    """
    model_type = config.get("model_type")
    if model_type not in FROM_FOLDER:
        raise UserError(
            f'config.json says model_type "{model_type}", which cannot be written as GGUF yet; '
            f"supported are {', '.join(FROM_FOLDER)}. llama.cpp's convert_hf_to_gguf.py may know "
            f"it."
        )
    return FROM_FOLDER[model_type]


# --------------------------------------------------------------------------------------------------
# Metadata


def hyperparameters(config: Config) -> dict[str, Any]:
    """The architecture's GGUF metadata: full key -> value.

    Values are int (for uint32), float (for float32), str, or a list of bool.

    Args:
        config: the parsed config.json.

    Raises:
        UserError: naming a key of config.json that is missing or that a GGUF cannot represent.
    """
    arch = architecture(config)
    flat = text_config(config)
    prefix = arch.gguf
    heads = count(flat, "num_attention_heads")
    hidden = count(flat, "hidden_size")
    head_size = head_dim(flat)
    values: dict[str, Any] = {
        SHARED["num_hidden_layers"]: count(flat, "num_hidden_layers"),
        SHARED["max_position_embeddings"]: count(flat, "max_position_embeddings"),
        SHARED["hidden_size"]: hidden,
        SHARED["intermediate_size"]: count(flat, "intermediate_size"),
        SHARED["num_attention_heads"]: heads,
        SHARED["num_key_value_heads"]: kv_heads(flat),
        SHARED["rms_norm_eps"]: real(flat, "rms_norm_eps"),
        "vocab_size": count(flat, "vocab_size"),
        "rope.dimension_count": rotary_dim(flat),
    }
    if flat.get("head_dim") is not None or head_size * heads != hidden:
        values[SHARED["head_dim"]] = head_size
        values["attention.value_length"] = head_size
    if not arch.folder.fixed_rope_base or flat.get("rope_theta") is not None:
        values[SHARED["rope_theta"]] = rope_theta(flat)
    values.update(_rope_scaling(flat, arch))
    values.update(arch.folder.keys(flat))
    return {f"{prefix}.{key}": value for key, value in values.items()}


def _rope_scaling(flat: dict[str, Any], arch: Written) -> dict[str, int | float | str]:
    scaling = flat.get("rope_scaling")
    kind = rope_kind(scaling)
    if not isinstance(scaling, Mapping) or kind in ("default", "llama3", "mrope"):
        return {}
    if kind == "linear":
        return {"rope.scaling.type": "linear", "rope.scaling.factor": real(scaling, "factor")}
    if kind == "yarn":
        values: dict[str, int | float | str] = {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": real(scaling, "factor"),
            "rope.scaling.original_context_length": int(
                scaling.get("original_max_position_embeddings") or 4096
            ),
        }
        for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)):
            # llama.cpp has metadata keys for these, but reads them only for other architectures.
            if (scaling.get(key) or default) != default:
                raise UserError(
                    f"config.json's rope_scaling sets {key} to {scaling[key]}, but llama.cpp "
                    f"always takes {default} for {arch.gguf}: remove rope_scaling to keep the "
                    f"trained context length."
                )
        return values
    if kind in ("longrope", "su") and arch.folder.longrope:
        context = max(2, original_context(flat))
        ratio = count(flat, "max_position_embeddings") / context
        factor = math.sqrt(1 + math.log(ratio) / math.log(context)) if ratio > 1 else 1.0
        return {"rope.scaling.type": "longrope", "rope.scaling.attn_factor": factor}
    raise UserError(
        f'config.json asks for rope_scaling of type "{kind}", which llama.cpp has no counterpart '
        f"for in {arch.gguf}: remove rope_scaling to keep the trained context length."
    )


# --------------------------------------------------------------------------------------------------
# Tensors


@dataclass(frozen=True)
class Target:
    """One tensor of the GGUF file and how it is made from source tensors.

    Its values are the sources' float32 values (stacked on a new first axis if ``stacked``), with
    rows permuted, plus ``offset``, times ``scale``.

    Attributes:
        name: its name in the GGUF file.
        sources: names of source tensors; several only for a stack of experts.
        stacked: whether the sources become one tensor with a leading axis of experts.
        permute_heads: n > 0 reorders the rows of n heads from half-split to interleaved; 0 does
            not.
        offset: added to every value (Gemma's norms).
        scale: factor of every value, where llama.cpp fixes a scale that config.json sets otherwise.
    """

    name: str
    sources: tuple[str, ...]
    stacked: bool = False
    permute_heads: int = 0
    offset: float = 0.0
    scale: float = 1.0

    @property
    def layer(self) -> int | None:
        """The number of its block; None for a tensor outside the blocks."""
        found = re.match(r"blk\.(\d+)\.", self.name)
        return int(found[1]) if found else None


@dataclass
class _Stack:
    parts: dict[int, str] = field(default_factory=dict)


def plan(config: Config, names: Iterable[str]) -> list[Target]:
    """The GGUF tensors that a model with source tensors of these names becomes, embeddings first.

    The names may be those of Hugging Face models or of mlx-lm's expert stacks (``switch_mlp``),
    with or without a prefix ``language_model.``. Tensors of a vision tower are left out.

    Raises:
        UserError: naming a tensor that has no place in the architecture, or a missing expert.
    """
    arch = architecture(config)
    flat = text_config(config)
    layers = count(flat, "num_hidden_layers")
    mapping = gguf.get_tensor_name_map(_gguf_arch(arch), layers)
    tied = arch.folder.always_tied or bool(
        flat.get("tie_word_embeddings", arch.folder.tied_by_default)
    )
    targets: dict[str, Target] = {}
    stacks: dict[str, _Stack] = {}
    for source in names:
        if is_skipped(source):
            continue
        plain = canonical_name(source)
        if plain == "lm_head.weight" and tied:
            continue
        expert = re.match(r"(.*\.experts)\.(\d+)\.(.*)$", plain)
        plain = f"{expert[1]}.{expert[3]}" if expert else plain.replace(".switch_mlp.", ".experts.")
        name = mapping.get_name(plain, try_suffixes=(".weight", ".bias"))
        layer = re.search(r"\.layers\.(\d+)\.", plain)
        if name is None or (layer and int(layer[1]) >= layers):
            raise UserError(
                f"{source} has no place in a GGUF of architecture {arch.gguf}: remove it, or write "
                f"the model with llama.cpp's convert_hf_to_gguf.py."
            )
        if expert:
            stacks.setdefault(name, _Stack()).parts[int(expert[2])] = source
            targets.setdefault(name, Target(name, (), stacked=True))
            continue
        if name in targets:
            raise UserError(
                f"{source} and {', '.join(targets[name].sources)} are both {name}: the folder "
                f"holds the same tensor twice; remove one."
            )
        targets[name] = Target(
            name,
            (source,),
            permute_heads=_permuted_heads(flat, arch, plain),
            offset=arch.folder.norm_offset if plain.endswith("norm.weight") else 0.0,
            scale=_attention_rescale(flat, arch, plain),
        )
    for name, stack in stacks.items():
        experts = count(flat, "num_experts")
        if len(stack.parts) != experts or max(stack.parts) != experts - 1:
            raise UserError(
                f"{name} is made of experts {sorted(stack.parts)}, but config.json says there are "
                f"{experts}: download the model again."
            )
        ordered = tuple(stack.parts[expert] for expert in range(experts))
        targets[name] = Target(name, ordered, stacked=True)
    if "token_embd.weight" not in targets:
        raise UserError("the folder has no embedding (model.embed_tokens.weight): download again.")
    return sorted(targets.values(), key=_file_order)


def is_skipped(source: str) -> bool:
    """Whether a tensor is left out: one of a vision tower, or a recomputed rotary table."""
    return _SKIPPED.search(source) is not None


def is_vision(source: str) -> bool:
    """Whether a tensor is one of a vision tower, which a GGUF of the language model lacks."""
    return _VISION.search(source) is not None


def canonical_name(source: str) -> str:
    """A tensor's name without ``language_model`` prefixes, as in a model that is not multimodal."""
    name = re.sub(r"^(model\.)?language_model\.", "", source)
    if not name.startswith(("model.", "lm_head.")):
        name = f"model.{name}"
    return name


def extra_tensors(config: Config) -> dict[str, np.ndarray]:
    """Tensors that are made from config.json: rotary factors, float32 (rotary dimensions / 2,).

    llama3 scaling becomes ``rope_freqs.weight``, the divisor of each frequency. Phi-3's longrope
    becomes ``rope_factors_long.weight`` and ``rope_factors_short.weight``.
    """
    flat = text_config(config)
    scaling = flat.get("rope_scaling")
    kind = rope_kind(scaling)
    if not isinstance(scaling, Mapping):
        return {}
    half = rotary_dim(flat) // 2
    if kind == "llama3":
        return {"rope_freqs.weight": _llama3_factors(scaling, flat, half)}
    if kind in ("longrope", "su"):
        factors = {}
        for length in ("long", "short"):
            values = np.asarray(scaling.get(f"{length}_factor"), dtype=np.float32)
            if values.shape != (half,):
                raise UserError(
                    f"config.json's rope_scaling.{length}_factor should be {half} numbers, has "
                    f"shape {values.shape}: download config.json again."
                )
            factors[f"rope_factors_{length}.weight"] = values
        return factors
    return {}


def _llama3_factors(scaling: Config, flat: Config, half: int) -> np.ndarray:
    base = rope_theta(flat)
    factor = real(scaling, "factor")
    low = float(scaling.get("low_freq_factor") or 1.0)
    high = float(scaling.get("high_freq_factor") or 4.0)
    context = float(scaling.get("original_max_position_embeddings") or 8192)
    if not low < high:
        raise UserError(
            f"config.json's rope_scaling has low_freq_factor {low:g}, which is not below its "
            f"high_freq_factor {high:g}: fetch config.json again."
        )
    wavelength = 2 * np.pi * base ** (np.arange(half, dtype=np.float64) / half)
    # Short waves keep their length, long ones are stretched by the whole factor, others in between.
    share = np.clip((context / wavelength - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - share) / factor + share)).astype(np.float32)


def _gguf_arch(arch: Written) -> gguf.MODEL_ARCH:
    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    return by_name[arch.gguf]


def _permuted_heads(flat: Config, arch: Written, plain: str) -> int:
    # With rope_traditional the rotation is interleaved already, so rows keep their order.
    if not arch.folder.permutes or flat.get("rope_traditional"):
        return 0
    if re.search(r"\.q_proj\.(weight|bias)$", plain):
        return count(flat, "num_attention_heads")
    if re.search(r"\.k_proj\.(weight|bias)$", plain):
        return kv_heads(flat)
    return 0


def _attention_rescale(flat: Config, arch: Written, plain: str) -> float:
    """The factor for the parameter ``rescaled``: 1 where no divisor of the queries is fixed.

    llama.cpp divides Gemma's queries by the root of the head size (in the 27B models of hidden /
    heads), whatever query_pre_attn_scalar config.json has.
    """
    if arch.folder.rescaled is None or not plain.endswith(arch.folder.rescaled):
        return 1.0
    wanted = float(flat.get("query_pre_attn_scalar") or 144.0)
    if count(flat, "num_hidden_layers") == arch.folder.largest:
        assumed = count(flat, "hidden_size") // count(flat, "num_attention_heads")
    else:
        assumed = head_dim(flat)
    return math.sqrt(assumed / wanted)


def _file_order(target: Target) -> tuple[int, int, str]:
    if target.layer is not None:
        return 1, target.layer, target.name
    return (0 if target.name.startswith("token_embd") else 2), 0, target.name
