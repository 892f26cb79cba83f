"""Parts of the record of `abl-mlx inspect` about residual writers, for all formats."""

from __future__ import annotations

import re
from collections.abc import Iterable

from abl_mlx.records.looks import EditShare, WriterGroup


def grouped(writers: Iterable[tuple[str, str, bool, bool]]) -> list[WriterGroup]:
    """The writers, with those that differ only in their layer as one entry.

    Args:
        writers: (name, kind, whether it has a gain, whether it has a bias) of each.
    """
    groups: dict[tuple[str, str, bool, bool], int] = {}
    for path, kind, gain, bias in writers:
        key = (re.sub(r"\.\d+\.", ".N.", path, count=1), kind, gain, bias)
        groups[key] = groups.get(key, 0) + 1
    return [
        WriterGroup(pattern=pattern, kind=kind, gain=gain, bias=bias, count=count)
        for (pattern, kind, gain, bias), count in groups.items()
    ]


def edit_share(touched: Iterable[int], whole: int) -> EditShare:
    """How much of a model a full edit changes.

    Args:
        touched: the number of parameters in each tensor that is edited.
        whole: the number of parameters in the whole model.
    """
    sizes = list(touched)
    share = sum(sizes) / max(whole, 1)
    return EditShare(tensors=len(sizes), parameters=sum(sizes), share=share)
