"""The families of vision towers that become projectors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from convert.projectors import gemma3, llama4, pixtral, qwen_vl
from convert.projectors.tower import Family

FAMILIES: tuple[Family, ...] = (
    *gemma3.FAMILIES,
    *qwen_vl.FAMILIES,
    *pixtral.FAMILIES,
    *llama4.FAMILIES,
)
"""Every family."""


def family(config: Mapping[str, Any]) -> Family | None:
    """The family of a folder with this config.json; None where there is none."""
    return next((one for one in FAMILIES if one.fits(config)), None)
