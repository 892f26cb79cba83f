"""Find, remove, add and detect the refusal direction of a local chat model.

The names below are all that a program needs; `abl_mlx.api` documents them. Each is imported when it
is first used, so that ``import abl_mlx`` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "DirectionFile",
    "Edit",
    "UserError",
    "ablation",
    "apply",
    "audit",
    "choose",
    "evaluate",
    "load",
    "load_prompts",
    "measure",
]

if TYPE_CHECKING:
    from abl_mlx.api import ablation, apply, audit, choose, evaluate, load, load_prompts, measure
    from abl_mlx.directions.direction_file import DirectionFile
    from abl_mlx.edits.edit import Edit
    from convert.base.errors import UserError

_ELSEWHERE = {
    "DirectionFile": "abl_mlx.directions.direction_file",
    "Edit": "abl_mlx.edits.edit",
    "UserError": "convert.base.errors",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'abl_mlx' has no attribute {name!r}")
    value = getattr(import_module(_ELSEWHERE.get(name, "abl_mlx.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
