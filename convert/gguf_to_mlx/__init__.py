"""A GGUF as an MLX model: in memory, or as a folder that mlx-lm loads.

What an architecture's metadata and tensor names mean is said in `convert.architectures.families`;
here the values are moved. Quantized blocks become MLX's where MLX has the same
(`convert.mlx.types`); other types stay packed in memory (`convert.mlx.packed`), and in a folder
become bfloat16, or are quantized anew by MLX when asked.
"""

from __future__ import annotations

from convert.gguf_to_mlx.folder import (
    DTYPES,
    FolderReport,
    drafting,
    fill_folder,
    read_back,
    write_folder,
)
from convert.gguf_to_mlx.memory import Loaded, load
from convert.gguf_to_mlx.parameters import Layout, layout

__all__ = [
    "DTYPES",
    "FolderReport",
    "Layout",
    "Loaded",
    "drafting",
    "fill_folder",
    "layout",
    "load",
    "read_back",
    "write_folder",
]
