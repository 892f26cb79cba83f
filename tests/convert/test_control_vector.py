"""Control vectors: what is written is what llama.cpp adds, and what is damaged is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.behaviour import evaluate
from abl_mlx.edits.steering import Intervention, steering
from abl_mlx.inputs import prompts, sources
from abl_mlx.models import chat_model
from convert.base.errors import UserError
from convert.gguf import control_vector
from convert.gguf.control_vector import ControlVector
from convert.mlx_to_gguf import write_gguf
from tests.support import llama_steering


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.cvec.gguf"
    layers = {1: np.arange(4, dtype=np.float32), 3: -np.ones(4, np.float32)}
    control_vector.write(path, ControlVector(layers, "llama", 5, {"abl_mlx.layer": 3}))
    read = control_vector.read(path)
    assert list(read.layers) == [1, 3]
    assert all(np.array_equal(read.layers[layer], layers[layer]) for layer in layers)
    assert (read.model_hint, read.layer_count, read.metadata["abl_mlx.layer"]) == ("llama", 5, 3)
    file = gguf.GGUFReader(path)
    assert file.fields["general.architecture"].contents() == "controlvector"
    assert {t.name: list(t.shape) for t in file.tensors} == {"direction.1": [4], "direction.3": [4]}
    theirs = llama_steering.loaded(path)  # llama.cpp's own reader
    assert np.array_equal(theirs, [layers[1], np.zeros(4), layers[3]])


@pytest.mark.parametrize(
    "layers",
    [
        {},
        {0: np.ones(4, np.float32)},
        {1: np.array([1, np.nan], np.float32)},
        {1: np.ones(4, np.float32), 2: np.ones(5, np.float32)},
    ],
)
def test_what_llama_cpp_would_not_take_is_not_written(
    layers: dict[int, np.ndarray], tmp_path: Path
) -> None:
    with pytest.raises(UserError):
        control_vector.write(tmp_path / "a.cvec.gguf", ControlVector(layers))
    assert not (tmp_path / "a.cvec.gguf").exists()


def test_a_model_is_no_control_vector(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("token_embd.weight", np.ones((2, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="holds no tensor direction"):
        control_vector.read(path)
    with pytest.raises(UserError, match="is no file"):
        control_vector.read(tmp_path / "nothing.cvec.gguf")


def test_llama_cpp_steers_as_mlx_does(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    folder = sources.resolve("demo").path
    chat = chat_model.load(folder)
    write_gguf(folder, tmp_path / "demo.gguf", file_type="F32")
    values = mx.random.normal((chat.width,), key=mx.random.key(2)) * 4.0
    path = tmp_path / "a.cvec.gguf"
    vector = {2: np.array(values.tolist(), np.float32)}
    control_vector.write(path, ControlVector(vector, "llama", len(chat.layers)))

    asked = [chat.encode(text) for text in prompts.load_demo().harmless.test.texts[:4]]
    end = set(chat.tokenizer.eos_token_ids)
    plain = evaluate.generate(chat, asked, 20)
    with steering(chat, Intervention("add", values[None], layers=frozenset([2]))):
        steered = evaluate.generate(chat, asked, 20)
    assert steered != plain

    def cut(reply: list[int]) -> list[int]:
        stop = next((at for at, token in enumerate(reply) if token in end), len(reply))
        return reply[:stop]

    size = chat.config["vocab_size"]
    sizes = (20, size, len(chat.layers))
    theirs = llama_steering.greedy(tmp_path / "demo.gguf", asked, *sizes)
    assert list(map(cut, theirs)) == plain
    theirs = llama_steering.greedy(tmp_path / "demo.gguf", asked, *sizes, path)
    assert list(map(cut, theirs)) == steered
