"""Fixtures shared by the tests: tiny models in folders, written once a session."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Two processes run the tests; threads of theirs would only wait for one another.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ.setdefault("LLAMA_ARG_THREADS", "1")  # llama.cpp's threads wait busily

from tests.support import tiny


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny_folder(arch, **options)``: the folder of a tiny model; never write into it."""
    made: dict[str, Path] = {}

    def folder(arch: str, **options: object) -> Path:
        key = f"{arch} {sorted(options.items())}"
        if key not in made:
            place = tmp_path_factory.mktemp(arch) / "model"
            made[key] = tiny.write_model(place, arch, **options)
        return made[key]

    return folder
