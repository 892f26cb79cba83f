"""Turns a GGUF into an MLX model: in memory, or as a folder that mlx-lm loads.

`convert.architectures.families` says what the metadata and tensor names of an architecture mean;
the modules here move the values. Quantized types that MLX has as well are repacked
(`convert.mlx.types`). Other types stay packed in memory (`convert.mlx.packed`); in a folder they
become bfloat16, or on request MLX quantizes them anew.
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
from convert.gguf_to_mlx.parameters import Layout, described, layout, places

__all__ = [
    "DTYPES",
    "FolderReport",
    "Layout",
    "Loaded",
    "described",
    "drafting",
    "fill_folder",
    "layout",
    "load",
    "places",
    "read_back",
    "write_folder",
]
