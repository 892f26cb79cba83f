"""Files made of the demo once for all tests of commands; never write into their folders."""

from __future__ import annotations

from pathlib import Path

import pytest

from abl_mlx.choices import MeasureOptions
from abl_mlx.commands import conversion, measure_apply


@pytest.fixture(scope="session")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's direction file."""
    path = tmp_path_factory.mktemp("direction") / "d.safetensors"
    measure_apply.measure("demo", path, MeasureOptions())
    return path


@pytest.fixture(scope="session")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as a GGUF in F16."""
    path = tmp_path_factory.mktemp("float") / "demo-F16.gguf"
    conversion.convert("demo", path, quantize="F16")
    return path
