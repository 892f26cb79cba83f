"""New tensors of a GGUF that ranks compute in turn: each some of them, and all write all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from abl_mlx.support import ranks
from convert.gguf.file import GgufSource
from convert.gguf.layout import in_data_order
from convert.gguf.pieces import Chunk, made
from convert.gguf.rewrite import Replacement


def in_turn(source: GgufSource, tensors: Mapping[str, Replacement]) -> Mapping[str, Replacement]:
    """The same tensors, each computed by one rank; memory holds as many of them as there are ranks.

    They are computed in the order in which `rewrite` writes them, that of their data.

    Args:
        source: the open GGUF.
        tensors: name -> its new data.
    """
    if ranks.size() == 1:
        return tensors
    names = [
        entry.name
        for part in source.layouts
        for entry in in_data_order(part.tensors)
        if entry.name in tensors
    ]

    def whole(name: str) -> np.ndarray:
        chunks = (
            one if isinstance(one, bytes) else one.tobytes()
            for one in map(made, tensors[name].chunks())
        )
        return np.frombuffer(b"".join(chunks), np.uint8)

    ready: dict[str, np.ndarray] = {}

    def taken(name: str) -> Replacement:
        def chunks() -> Iterator[Chunk]:
            if name not in ready:
                coming = names[names.index(name) :][: ranks.size()]
                ready.update(zip(coming, ranks.in_turn("new tensors", coming, whole), strict=True))
            yield ready.pop(name)

        return Replacement(tensors[name].type, tensors[name].shape, chunks)

    return {name: taken(name) for name in tensors}
