"""GGUFs as MLX models, held against llama.cpp on the same files."""

from __future__ import annotations

from pathlib import Path

import pytest
from gguf import GGMLQuantizationType

from convert.gguf_file import GgufSource
from convert.gguf_to_mlx import load
from tests import tiny_gguf
from tests.agreement import disagreement
from tests.gguf_recipes import RECIPES

PROMPT = [5, 77, 301, 12, 450, 88, 19, 260, 7, 333, 41]

#: How far llama.cpp, which rounds activations to 8 bits beside quantized weights, may be.
LIMITS = {"F16": 0.02, "Q8_0": 0.05, "Q4_K": 0.15}


@pytest.mark.parametrize("file_type", LIMITS)
@pytest.mark.parametrize("name", RECIPES)
def test_mlx_answers_as_llama_cpp_does(name: str, file_type: str, tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", RECIPES[name], GGMLQuantizationType[file_type])
    with GgufSource(path) as source:
        model = load(source).model
    limit = LIMITS[file_type]
    assert disagreement(model, path, PROMPT, near=limit) < limit
