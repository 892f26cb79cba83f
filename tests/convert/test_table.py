"""The table of architectures: entries are whole, have recipes, and agree with themselves."""

from __future__ import annotations

from convert.architectures.table import ARCHITECTURES, FROM_FOLDER, IN_MLX, REFUSED, STREAMS
from tests.support.gguf_recipes import RECIPES


def test_every_architecture_that_mlx_runs_is_written_from_a_folder():
    assert {one.gguf for kinds in FROM_FOLDER.values() for one in kinds} == IN_MLX.keys()


def test_every_architecture_can_be_edited_or_is_refused():
    assert STREAMS.keys() | REFUSED.keys() == ARCHITECTURES.keys()
    assert not STREAMS.keys() & REFUSED.keys()
    for name, one in ARCHITECTURES.items():
        assert one.name == name
        assert one.stream or not (one.in_mlx or one.from_folder)


def test_every_architecture_that_mlx_runs_has_a_recipe():
    # Of the others llama.cpp builds a model itself: tests/convert/test_gguf_writers.py.
    assert {recipe.architecture for recipe in RECIPES.values()} == IN_MLX.keys()
