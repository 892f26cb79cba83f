"""Tiny language models of Qwen 2.5 VL and Qwen 3 VL, with and without experts."""

from __future__ import annotations

from tests.support.gguf_recipes.llama import usual_keys, usual_tensors
from tests.support.gguf_recipes.qwen import EXPERTS, quiet
from tests.support.tiny_gguf import Recipe

RECIPES: dict[str, Recipe] = {
    "qwen2vl": Recipe(
        "qwen2vl",
        # llama.cpp does not read this number for qwen2vl, and takes zero: real models have 1e-6.
        usual_keys(
            rope__freq_base=1e6,
            rope__dimension_sections=[4, 6, 6, 0],
            attention__layer_norm_rms_epsilon=1e-6,
        ),
        usual_tensors(qkv_bias=True),
    ),
    "qwen3vl": Recipe(
        "qwen3vl",
        usual_keys(
            rope__freq_base=1e6,
            attention__key_length=64,
            attention__value_length=64,
            rope__dimension_count=64,
            rope__dimension_sections=[12, 10, 10, 0],
            n_deepstack_layers=2,
        ),
        usual_tensors(head=64, tied=True, qk_norm=True),
    ),
    "qwen3vlmoe": Recipe(
        "qwen3vlmoe",
        usual_keys(
            rope__freq_base=1e6,
            attention__key_length=64,
            attention__value_length=64,
            rope__dimension_count=64,
            rope__dimension_sections=[12, 10, 10, 0],
            n_deepstack_layers=2,
            **EXPERTS,
        ),
        usual_tensors(head=64, qk_norm=True, experts=4),
        values=quiet,
    ),
}
