"""A model in whatever format is asked in one way, and what its format is, is asked in one place."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import abl_mlx
from abl_mlx import demo
from abl_mlx.commands import conversion
from abl_mlx.demo import MODEL_PATH
from abl_mlx.inputs.sets import Prompt
from abl_mlx.outputs.model_file import find_model
from convert.gguf.file import GgufSource
from tests.support.odd_ggufs import split

#: Modules that may ask whether something is a GGUF: what was typed, and what a name stands for.
MAY_ASK = {
    "sources.py", "hub.py", "staging.py", "model_file.py", "remote_file.py", "reproduce.py",
    "early.py",
}  # fmt: skip


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "demo.gguf"
    conversion.convert("demo", path, quantize="F32")
    return path


def test_formats_are_asked_in_one_place() -> None:
    folder = Path(abl_mlx.__file__).parent
    asking = {
        file.name
        for file in folder.rglob("*.py")
        if re.search(r"\bis_gguf|isinstance\(\w+, (GgufFile|FolderFile)", file.read_text())
    }
    assert asking <= MAY_ASK


@pytest.mark.parametrize("kind", ["folder", "gguf"])
def test_both_formats_give_the_same_answers(kind: str, gguf: Path) -> None:
    with find_model("demo" if kind == "folder" else str(gguf)) as model:
        assert model.context_length() == 512
        assert model.has_tokens(demo.vocabulary())
        assert not model.has_tokens({"no such token": 0})
        model.check_template()  # raises where there is none
        assert model.label() is None
        assert model.token_counter()(Prompt("How do I plan a garden?")) > 5
        assert model.inspect()["width"] == 256
        kinds = model.kinds()
        assert model.size >= sum(4 * int(np.prod(shape)) for _, shape in kinds.values()) / 2
        name = next(name for name in kinds if "embed" in name or "embd" in name)
        values, raw = model.values(name), model.raw(name)
        assert values.shape == kinds[name][1]
        assert raw.dtype == np.uint8
        assert set(model.hashes()) == {Path(one).name for one, _, _ in model.fingerprint()} - {
            file.name for file in MODEL_PATH.iterdir() if file.suffix != ".safetensors"
        }
        chat = model.load()
        writers = model.find_writers(chat)
        found = model.stream_weights()
        assert len(writers) == len(found.writers) == 9
        assert chat.width == found.width == 256


def test_the_parts_of_a_split_gguf_are_one_model(gguf: Path, tmp_path: Path) -> None:
    """Its hashes name every part, and its size counts them all."""
    parts = split(gguf, tmp_path / "m.gguf", 12)
    assert len(parts) > 2
    with find_model(str(parts[1])) as model, GgufSource(gguf) as whole:
        assert set(model.kinds()) == set(whole.tensors)
        assert set(model.hashes()) == {part.name for part in parts}
        assert model.size == sum(part.stat().st_size for part in parts)
