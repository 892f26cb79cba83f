"""The table of architectures: entries are whole, have recipes, and agree with themselves."""

from __future__ import annotations

from pathlib import Path

import pytest

from convert.architectures import hf_to_gguf
from convert.architectures.keys import Keys
from convert.architectures.table import ARCHITECTURES, FROM_FOLDER, IN_MLX, REFUSED, STREAMS
from convert.gguf.file import GgufSource
from tests.support import tiny, tiny_gguf
from tests.support.gguf_recipes import RECIPES

BOTH_WAYS = sorted(
    name for name, recipe in RECIPES.items() if ARCHITECTURES[recipe.architecture].from_folder
)


def test_every_architecture_can_be_edited_or_is_refused():
    assert STREAMS.keys() | REFUSED.keys() == ARCHITECTURES.keys()
    assert not STREAMS.keys() & REFUSED.keys()
    for name, one in ARCHITECTURES.items():
        assert one.name == name
        assert one.stream or not (one.in_mlx or one.from_folder)


def test_every_architecture_that_mlx_runs_has_a_recipe():
    # Of the others llama.cpp builds a model itself: tests/convert/test_gguf_writers.py.
    assert {recipe.architecture for recipe in RECIPES.values()} == IN_MLX.keys()


def test_every_folder_that_becomes_a_gguf_has_a_tiny_model():
    tiny_types = {config["model_type"] for config in tiny.ARCHITECTURES.values()}
    # A multimodal Gemma 3 is the same model with its config nested; gemma has gemma2's recipe.
    assert tiny_types | {"gemma", "gemma3"} == FROM_FOLDER.keys()


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_keys_and_tensors_come_back(name: str, tmp_path: Path):
    """A GGUF's config.json and parameters, taken for a folder, name the GGUF's keys and tensors."""
    recipe = RECIPES[name]
    with GgufSource(tiny_gguf.write(tmp_path / "tiny.gguf", recipe)) as source:
        keys, in_mlx = Keys(source), IN_MLX[recipe.architecture]
        config = in_mlx.config(keys)
        if config["model_type"] not in FROM_FOLDER:
            # Mixtral and OLMo 3, which share a GGUF architecture with others.
            assert config["model_type"] in ("mixtral", "olmo3")
            return
        weights = {weight.path: weight.pieces[0].tensor for weight in in_mlx.weights(keys)}
        targets = hf_to_gguf.plan(config, weights)
        # A stack of experts is (E, out, in) in both.
        assert {t.sources[0]: t.name for t in targets} == weights
        found = hf_to_gguf.hyperparameters(config)
        metadata = source.metadata
        # Neither runtime looks at phi3's window, and config.json is written without it.
        compared = {key for key in found if key in metadata} - {"phi3.attention.sliding_window"}
        assert len(compared) >= 9
        for key in compared:
            number = type(metadata[key]) in (int, float)
            wanted = pytest.approx(metadata[key], rel=1e-6) if number else metadata[key]
            assert found[key] == wanted, key
