"""Every architecture's entry, by its name in a GGUF and by the model_type of a folder."""

from __future__ import annotations

from dataclasses import dataclass

from convert.architectures.architecture import Architecture, FromFolder, InMlx, Stream
from convert.architectures.families import (
    cohere,
    deepseek,
    dense,
    ernie,
    gemma,
    gemma4,
    gpt_oss,
    granite,
    lfm2,
    llama,
    llama4,
    mistral3,
    others,
    phi,
    qwen,
    qwen_hybrid,
    qwen_vl,
)

_GROUPS = (
    *(
        llama,
        llama4,
        mistral3,
        qwen,
        qwen_hybrid,
        qwen_vl,
        gemma,
        gemma4,
        phi,
        cohere,
        dense,
        ernie,
    ),
    *(granite, deepseek, gpt_oss, lfm2, others),
)

ARCHITECTURES: dict[str, Architecture] = {
    one.name: one for group in _GROUPS for one in group.ARCHITECTURES
}
"""general.architecture -> its entry."""

STREAMS: dict[str, Stream] = {
    name: one.stream for name, one in ARCHITECTURES.items() if one.stream is not None
}
"""general.architecture -> its residual writers, for the architectures that can be edited."""

REFUSED: dict[str, str] = {name: one.refused for name, one in ARCHITECTURES.items() if one.refused}
"""general.architecture -> why its weights cannot be edited exactly, in one sentence."""

IN_MLX: dict[str, InMlx] = {
    name: one.in_mlx for name, one in ARCHITECTURES.items() if one.in_mlx is not None
}
"""general.architecture -> how mlx-lm runs its GGUFs, for the architectures that it can run."""


@dataclass(frozen=True)
class Written:
    """The architecture that a folder becomes in a GGUF.

    Attributes:
        gguf: its general.architecture, also the prefix of its metadata keys.
        folder: how its folders become GGUFs.
    """

    gguf: str
    folder: FromFolder


def _from_folder() -> dict[str, tuple[Written, ...]]:
    found: dict[str, tuple[Written, ...]] = {}
    for name, one in ARCHITECTURES.items():
        for folder in one.from_folder:
            for model_type in folder.model_types:
                found[model_type] = (*found.get(model_type, ()), Written(name, folder))
    return found


FROM_FOLDER: dict[str, tuple[Written, ...]] = _from_folder()
"""model_type of config.json -> the architectures in a GGUF that it may be written as."""
