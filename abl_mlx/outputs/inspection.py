"""What `abl-mlx inspect` says of residual writers, whatever file they are in."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any


def grouped(writers: Iterable[tuple[str, str, bool, bool]]) -> list[dict[str, Any]]:
    """Writers that differ in their layer alone, told once.

    Args:
        writers: (name, kind, whether through a gain, whether with a bias).
    """
    groups: dict[tuple[str, str, bool, bool], int] = {}
    for path, kind, gain, bias in writers:
        key = (re.sub(r"\.\d+\.", ".N.", path, count=1), kind, gain, bias)
        groups[key] = groups.get(key, 0) + 1
    return [
        {"pattern": pattern, "kind": kind, "gain": gain, "bias": bias, "count": count}
        for (pattern, kind, gain, bias), count in groups.items()
    ]


def edit_share(touched: Iterable[int], whole: int) -> dict[str, Any]:
    """How much of a model a full edit changes.

    Args:
        touched: number of parameters of each tensor that is edited.
        whole: of the whole model.
    """
    sizes = list(touched)
    return {"tensors": len(sizes), "parameters": sum(sizes), "share": sum(sizes) / max(whole, 1)}
