"""Folders of every architecture as GGUFs: against llama.cpp's converter, and back and forth.

What the converter makes of the same folders is recorded in tests/support/converter_record.json by
``python -m tests.support.record_converter``, which says how to run it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from mlx_lm.utils import load_model

from convert.architectures.table import IN_MLX
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx import layout, write_folder
from convert.gguf_to_mlx.values import values_of
from convert.mlx.safetensors_files import TensorFiles
from convert.mlx_to_gguf import GgufReport, write_gguf
from tests.support import published, tiny_gguf
from tests.support.agreement import disagreement
from tests.support.gguf_recipes import RECIPES
from tests.support.record_converter import PRE, RECORD, described, recipes

PROMPT = [5, 77, 301, 12, 450, 88, 19, 260, 7, 333, 41]

_RECORD: dict[str, Any] = json.loads(RECORD.read_text())
RECORDED: dict[str, dict[str, Any]] = _RECORD["models"]

#: Keys that the converter does not write for these, and without which llama.cpp runs another model.
FURTHER = {
    "llama, yarn with a factor": {"llama.rope.scaling.attn_factor"},
    "phi3, linear": {"phi3.rope.scaling.type", "phi3.rope.scaling.factor"},
    "cohere2, another pattern": {"cohere2.attention.sliding_window_pattern"},
    "hub gemma3_text": {"gemma3.attention.sliding_window_pattern"},
    "gemma3, untied, every third layer full": {"gemma3.attention.sliding_window_pattern"},
    "gpt-oss, first layer full": {"gpt-oss.attention.sliding_window_pattern"},
}


#: Keys that say what llama.cpp would assume or guess without them.
SAID = {
    f"tokenizer.ggml.{key}"
    for key in (
        "add_bos_token",
        "add_eos_token",
        "add_space_prefix",
        "eot_token_id",
        "eom_token_id",
    )
}

#: Numbers that the converter knows of one published model, and that are wrong for these.
BY_NUMBER = {
    "gemma": {"tokenizer.ggml.eot_token_id"},
    "ernie4_5-moe": {"ernie4_5-moe.expert_shared_feed_forward_length"},
}


def test_every_architecture_is_recorded() -> None:
    assert RECORDED.keys() == set(recipes())
    assert {one.architecture for name, one in RECIPES.items() if name in recipes()} == IN_MLX.keys()


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("name", sorted(RECORDED))
def test_a_published_folder_becomes_the_file_that_the_converter_writes(
    name: str, tmp_path: Path
) -> None:
    folder = published.write(tmp_path / "model", name)
    for kind, recorded in RECORDED[name].items():
        path = tmp_path / f"{kind}.gguf"
        pre = None if (folder / "tokenizer.model").exists() else PRE
        report = write_gguf(folder, path, file_type=kind, pre=pre)
        found = described(path)
        assert found["tensors"] == recorded["tensors"]
        if kind == "F32":
            _assert_read_back(folder, report)
        tokenizer = _RECORD["tokenizers"][recorded["tokenizer"]]
        for part, theirs, further in (
            ("metadata", recorded["metadata"], FURTHER.get(name, set())),
            ("tokenizer", tokenizer, SAID),
        ):
            ours = found[part]
            assert ours.keys() - theirs.keys() <= further
            compared = theirs.keys() - BY_NUMBER.get(name, set())
            assert {key: ours.get(key) for key in compared} == {
                key: theirs[key] for key in compared
            }


def _assert_read_back(folder: Path, report: GgufReport) -> None:
    read = report.reader()
    with TensorFiles(folder) as files:
        assert sorted(report.tensors) == sorted(files.names)
        for name in files.names:
            stored = np.array(files.read(name).astype(mx.float32))
            np.testing.assert_allclose(read(name), stored, rtol=1e-6, atol=1e-6)


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("name", RECIPES)
def test_a_folder_comes_back_from_its_gguf(name: str, tmp_path: Path) -> None:
    """mlx-lm's parameters: GGUF -> folder -> GGUF -> folder, bit for bit."""
    path = tiny_gguf.write(tmp_path / "first.gguf", RECIPES[name], GGMLQuantizationType.F32)
    with GgufSource(path) as source:
        write_folder(source, tmp_path / "first", dtype="float32")
    write_gguf(tmp_path / "first", tmp_path / "second.gguf", file_type="F32")
    with GgufSource(tmp_path / "second.gguf") as source, TensorFiles(tmp_path / "first") as files:
        found = layout(source)
        first = json.loads((tmp_path / "first" / "config.json").read_text())
        for key in found.config.keys() & first.keys():
            number = type(first[key]) is float
            wanted = pytest.approx(first[key], rel=1e-6) if number else first[key]
            assert found.config[key] == wanted, key
        assert sorted(found.weights) == sorted(files.names)
        for parameter, weight in found.weights.items():
            stored = np.array(files.read(parameter))
            back = values_of(source, weight)
            # exp(log(x)) is rounded twice.
            close = 3e-7 if parameter.endswith("A_log") else 0.0
            np.testing.assert_allclose(back, stored, rtol=close, atol=close)


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("name", RECIPES)
def test_llama_cpp_answers_as_mlx_lm_does_from_a_published_folder(
    name: str, tmp_path: Path
) -> None:
    path = tiny_gguf.write(tmp_path / "first.gguf", RECIPES[name], GGMLQuantizationType.F16)
    with GgufSource(path) as source:
        write_folder(source, tmp_path / "folder")
    written = write_gguf(tmp_path / "folder", tmp_path / "second.gguf")
    model, _ = load_model(tmp_path / "folder")
    model.set_dtype(mx.float32)
    assert disagreement(model, written.path, PROMPT, near=0.02) < 0.02
