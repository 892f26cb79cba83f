"""The language models of Qwen 2 VL, Qwen 2.5 VL and Qwen 3 VL, which may have experts.

A token of a picture has three positions, which turn parts (sections) of its queries and keys. Text
has the same number three times, so that text alone runs as in qwen2 and qwen3.
"""

from __future__ import annotations

from typing import Any

from convert.architectures.architecture import Architecture, FromFolder, InMlx, plain
from convert.architectures.families.llama import PLAIN, qwen_config
from convert.architectures.families.qwen import MOE, moe_config, moe_weights, qwen3moe_keys
from convert.architectures.hf_keys import Config
from convert.architectures.stored import Rule, Stored, halved_columns, swapped
from convert.base.errors import UserError


def _keys(flat: Config) -> dict[str, Any]:
    """The sections, which llama.cpp requires."""
    for name in ("rope_parameters", "rope_scaling"):
        found = (flat.get(name) or {}).get("mrope_section")
        if isinstance(found, list):
            return {"rope.dimension_sections": ([int(one) for one in found] + [0] * 4)[:4]}
    raise UserError("config.json has no mrope_section in rope_scaling: download it again.")


def _deep_keys(flat: Config) -> dict[str, Any]:
    """The sections, and how many layers get outputs from inside the vision tower."""
    vision = flat.get("vision_config")
    deep = vision.get("deepstack_visual_indexes") if isinstance(vision, dict) else None
    return _keys(flat) | {"n_deepstack_layers": len(deep) if isinstance(deep, list) else 0}


def _expert_keys(flat: Config) -> dict[str, Any]:
    return _deep_keys(flat) | qwen3moe_keys(flat)


def _switched(rule: Rule) -> Rule:
    """The rule, for experts that lie in ``switch_mlp`` in MLX."""
    return lambda folder, path, source: rule(
        folder, path.replace(".experts.", ".switch_mlp."), source
    )


_EXPERTS = Stored(
    {r"\.mlp\.experts\.(gate_up|down)_proj(\.weight)?$": r".mlp.experts.\1_proj.weight"},
    {
        r"\.experts\.gate_up_proj\.weight$": _switched(halved_columns),
        r"\.experts\.down_proj\.weight$": _switched(swapped),
    },
)
"""Publishers store transposed stacks (E, in, out), the gate's columns before those of up."""

ARCHITECTURES = (
    Architecture(
        "qwen2vl",
        plain(),
        InMlx(qwen_config("qwen2"), PLAIN),
        (FromFolder(("qwen2_vl", "qwen2_5_vl"), _keys),),
    ),
    Architecture(
        "qwen3vl",
        plain(reads="cls.output"),
        InMlx(qwen_config("qwen3"), PLAIN),
        (FromFolder(("qwen3_vl",), _deep_keys),),
    ),
    Architecture(
        "qwen3vlmoe",
        plain(),
        InMlx(moe_config("qwen3_moe", normalized=True), MOE, moe_weights),
        (FromFolder(("qwen3_vl_moe",), _expert_keys, _EXPERTS),),
    ),
)
