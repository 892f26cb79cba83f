"""The families of vision towers that become projectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.projectors import gemma3, gemma4, llama4, pixtral, qwen_vl
from convert.projectors.tower import Family

FAMILIES: tuple[Family, ...] = (
    *gemma3.FAMILIES,
    *gemma4.FAMILIES,
    *qwen_vl.FAMILIES,
    *pixtral.FAMILIES,
    *llama4.FAMILIES,
)
"""Every family."""


def missing(config: Mapping[str, Any]) -> str:
    """Why there is no family for a folder with this config.json, as a part of a sentence."""
    kind = config.get("model_type")
    vision = config.get("vision_config")
    tower = vision.get("model_type") if isinstance(vision, dict) else None
    if kind == "llava" and tower == "clip_vision_model":
        return (
            "its tower is CLIP, of which llama.cpp's convert_hf_to_gguf.py writes no projector "
            "either (its older llava_surgery.py does)"
        )
    return f'there is no entry for the vision tower of a "{kind}" yet'


def family(config: Mapping[str, Any]) -> Family | None:
    """The family of a folder with this config.json; None where there is none."""
    return next((one for one in FAMILIES if one.fits(config)), None)
