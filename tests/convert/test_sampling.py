"""What a model's makers say of sampling: from a folder into a GGUF, kept by edits, and back.

That the keys are those of llama.cpp's converter is tested in tests/convert/test_folders_to_gguf.py.
"""

from __future__ import annotations

import json

import pytest
from gguf import GGUFReader

from convert.gguf.file import GgufSource
from convert.gguf.rewrite import rewrite
from convert.gguf.sampling import generation_config, sampling_keys
from convert.gguf_to_mlx import write_folder
from convert.mlx_to_gguf import write_gguf

STORED = {"temperature": 0.6, "top_k": 20, "top_p": 0.95, "min_p": 0.0, "do_sample": True}


def sampling_of(path):
    fields = GGUFReader(path).fields
    return {
        key.removeprefix("general.sampling."): (one.types[0].name, one.contents())
        for key, one in fields.items()
        if key.startswith("general.sampling.")
    }


def test_sampling_goes_into_a_gguf_and_comes_back(tiny_folder, tmp_path):
    folder = tiny_folder("qwen3", tokenizer="native")
    path = folder / "generation_config.json"
    stored = json.loads(path.read_text()) | STORED
    path.write_text(json.dumps(stored))
    write_gguf(folder, tmp_path / "a.gguf", file_type="F32")
    written = sampling_of(tmp_path / "a.gguf")
    assert written["temp"] == ("FLOAT32", pytest.approx(0.6))
    assert written["top_k"] == ("INT32", 20)
    with GgufSource(tmp_path / "a.gguf") as source:
        changed = {"general.name": "edited", "general.sampling.top_k": 30}
        rewrite(source, tmp_path / "b.gguf", metadata=changed)
        write_folder(source, tmp_path / "back")
    assert sampling_of(tmp_path / "b.gguf") == {**written, "top_k": ("INT32", 30)}
    again = json.loads((tmp_path / "back" / "generation_config.json").read_text())
    assert sorted(again["eos_token_id"]) == stored["eos_token_id"]
    assert {key: again[key] for key in STORED} == STORED


@pytest.mark.parametrize(
    ("stored", "keys"),
    [
        ({"temperature": "0.6", "top_p": True, "sequence": 3}, {}),
        ({"top_k": 2.5, "mirostat": 2**31, "min_p": None}, {}),
        ({"top_p": 1e300}, {}),
        ({"temperature": 1}, {"general.sampling.temp": 1.0}),
    ],
)
def test_a_value_that_no_program_can_sample_by_is_left_out(tmp_path, stored, keys):
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    assert sampling_keys(tmp_path) == keys


def test_sampling_at_temperature_0_is_the_likeliest_token():
    """transformers refuses a temperature of 0."""
    assert generation_config({"general.sampling.temp": 0.0}) == {"do_sample": False}
    assert generation_config({}) == {}
