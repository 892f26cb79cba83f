"""What several tests of this folder ask."""

from __future__ import annotations

from pathlib import Path

import pytest

from abl_mlx.commands import conversion


@pytest.fixture(scope="session")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as a GGUF of 16-bit floats, where llama.cpp is there to run it."""
    pytest.importorskip("xllamacpp")
    path = tmp_path_factory.mktemp("gguf") / "demo.gguf"
    conversion.convert("demo", path, quantize="F16")
    return path
