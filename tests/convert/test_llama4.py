"""Llama 4 beyond what every architecture is tested for: Maverick, and what has no GGUF."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx import layout, load
from convert.mlx_to_gguf import check_convertible
from tests.convert.test_gguf_to_mlx import LIMITS, PROMPT
from tests.support import published, tiny_gguf
from tests.support.agreement import disagreement
from tests.support.gguf_recipes import llama4
from tests.support.tiny_gguf import Recipe


def test_with_128_experts_queries_and_keys_are_not_normalized(tmp_path: Path) -> None:
    recipe = Recipe("llama4", llama4.keys(128, 32), llama4.tensors(128, 32), llama4.values)
    path = tiny_gguf.write(tmp_path / "tiny.gguf", recipe)
    with GgufSource(path) as source:
        loaded = load(source)
    assert loaded.config["text_config"]["use_qk_norm"] is False
    assert disagreement(loaded.model, path, PROMPT, near=LIMITS["F16"]) < LIMITS["F16"]


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"block_count": 3}, "has 3 layers"),
        ({"attention.sliding_window": 0}, "its own attention.sliding_window"),
        ({"expert_used_count": 2}, "sends a token to several experts"),
    ],
)
def test_files_that_mlx_cannot_run(tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    recipe = llama4.RECIPES["llama4"]
    path = tiny_gguf.write(tmp_path / "t.gguf", replace(recipe, keys={**recipe.keys, **keys}))
    with GgufSource(path) as source, pytest.raises(UserError, match=said):
        layout(source)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention_chunk_size", 4096),
        ("attn_temperature_tuning", False),
        ("use_qk_norm", False),
        ("num_experts_per_tok", 2),
        ("no_rope_layers", [1, 1, 1, 1]),
    ],
)
def test_folders_that_llama_cpp_would_run_otherwise(tmp_path: Path, key: str, value: Any) -> None:
    folder = published.write(tmp_path / "model", "llama4")
    config = json.loads((folder / "config.json").read_text())
    config["text_config"][key] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"config.json's {key} .*the model has no GGUF"):
        check_convertible(folder, None, pre="qwen2")
