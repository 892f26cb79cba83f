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


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of journals, which is empty; no key is set."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("ABL_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    return tmp_path / "cache" / "abl-mlx" / "eval"
