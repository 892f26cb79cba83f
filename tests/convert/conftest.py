"""Models that several tests of this folder read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from convert.mlx_to_gguf import write_gguf
from tests.support import tiny


@pytest.fixture(scope="session")
def model(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model in F16; never write to it."""
    folder = tiny_folder("qwen3", tokenizer="native", **tiny.WIDE)
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "model.gguf").path


@pytest.fixture(scope="session")
def wide(tiny_folder: Callable[..., Path]) -> Path:
    """A folder whose rows fit K-quants; never write into it."""
    return tiny_folder("llama", tokenizer="native", **tiny.WIDE)
