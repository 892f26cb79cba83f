"""Folders that no GGUF can be made of, and damaged safetensors: one sentence says why."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from convert.base.errors import UserError
from convert.gguf import file as gguf_file
from convert.mlx.safetensors_files import TensorFiles
from convert.mlx_to_gguf import write_gguf
from tests.convert.test_mlx_to_gguf import YARN
from tests.support import tiny


def _change(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "llama")
    out = tmp_path / "out.gguf"
    weights = mx.load(str(folder / "model.safetensors"))
    original = (folder / "config.json").read_text()

    def refuses(words: str, file_type: str = "F16") -> None:
        with pytest.raises(UserError, match=words):
            write_gguf(folder, out, file_type=file_type)
        assert not out.exists()

    refuses("Q7 is not a supported GGUF file type", "Q7")
    for changes, words in (
        ({"model_type": "mamba"}, 'model_type "mamba", which cannot be written'),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 'rope_scaling of type "dynamic"'),
        ({"rope_scaling": {**YARN, "beta_fast": 16.0}}, "sets beta_fast to 16"),
        ({"max_position_embeddings": None}, "config.json has no max_position_embeddings"),
    ):
        _change(folder, **changes)
        refuses(words)
        (folder / "config.json").write_text(original)
    for name, value, words in (
        ("model.layers.0.mlp.extra.weight", mx.zeros((2, 2)), r"mlp\.extra\.weight has no place"),
        ("model.layers.9.mlp.up_proj.weight", mx.zeros((2, 2)), r"layers\.9\.mlp\.up_proj"),
        ("model.norm.weight", mx.full((64,), math.inf), r"model\.norm\.weight holds NaN or inf"),
        (
            "model.norm.scales",
            mx.zeros((64,)),
            r"quantized \(model\.norm\.scales\) in an",
        ),
        ("model.norm.weight", mx.zeros((64,), mx.uint32), r"norm\.weight .* stored as U32"),
    ):
        mx.save_safetensors(str(folder / "model.safetensors"), {**weights, name: value})
        refuses(words)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    out.write_text("mine")
    with pytest.raises(UserError, match="already exists"):
        write_gguf(folder, out)
    assert out.read_text() == "mine"


def test_missing_experts_are_counted(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "qwen3_moe")
    weights = mx.load(str(folder / "model.safetensors"))
    del weights["model.layers.1.mlp.experts.2.up_proj.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    with pytest.raises(UserError, match=r"made of experts \[0, 1, 3\].*there are 4"):
        write_gguf(folder, tmp_path / "out.gguf")


def test_experts_that_llama_cpp_weighs_otherwise_are_refused(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "qwen3_moe", norm_topk_prob=False)
    with pytest.raises(UserError, match="norm_topk_prob"):
        write_gguf(folder, tmp_path / "out.gguf")


# --------------------------------------------------------------------------------------------------
# Reading back


def test_reading_names_file_and_tensor(wide: Path, tmp_path: Path) -> None:
    report = write_gguf(wide, tmp_path / "model.gguf")
    with pytest.raises(UserError, match=r"model\.gguf has no tensor named blk\.99"):
        gguf_file.read_tensor(report.path, "blk.99.ffn_down.weight")
    with pytest.raises(UserError, match=r"missing\.gguf is no file"):
        gguf_file.metadata(tmp_path / "missing.gguf")
    (tmp_path / "bad.gguf").write_bytes(b"nonsense" * 9)
    with pytest.raises(UserError, match=r"bad\.gguf is no readable GGUF"):
        gguf_file.tensor_types(tmp_path / "bad.gguf")


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_safetensors_read_as_mlx_reads_them(tmp_path: Path, dtype: str) -> None:
    folder = tiny.write_model(tmp_path / "model", "llama", dtype=dtype, shards=2)
    expected: dict[str, mx.array] = {}
    for file in folder.glob("model*.safetensors"):
        expected.update(mx.load(str(file)))
    with TensorFiles(folder) as files:
        assert sorted(files.names) == sorted(expected)
        for name in files.names:
            array = files.read(name)
            assert array.dtype == expected[name].dtype
            assert mx.array_equal(array, expected[name]).item()
            info = files.info(name)
            with open(info.file, "rb") as stream:
                stream.seek(info.offset)
                assert stream.read(info.nbytes) == bytes(files.bytes(name))
    (folder / "model.safetensors.index.json").unlink()
    assert sorted(TensorFiles(folder).names) == sorted(expected)


def _safetensors(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(raw) if length is None else length) + raw + data


def _entry(first: int, last: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [first, last]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\1\2", "only 2 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (_safetensors({}, length=1 << 60), "header claims"),
        (_safetensors(b"{nonsense"), "not valid JSON"),
        (_safetensors(b"[]"), "no JSON object"),
        (_safetensors(b'{"a": {}, "a": {"b": 1}}'), '"a" appears twice'),
        (_safetensors({"a": {"dtype": "F32"}}), "a lacks dtype, shape or data_offsets"),
        (_safetensors({"a": _entry(0, 4, [1], "F6")}, b"1234"), "stored as F6"),
        (_safetensors({"a": _entry(0, 4, [-1])}, b"1234"), "malformed shape"),
        (_safetensors({"a": _entry(0, 4, [2])}, b"1234"), "8 bytes, but spans 4"),
        (_safetensors({"a": _entry(0, 8, [2])}, b"1234"), "it is truncated"),
        (_safetensors({"a": _entry(0, 4, [1]), "b": _entry(2, 6, [1])}, b"123456"), "overlaps"),
        (_safetensors({"a": _entry(4, 8, [1])}, b"12345678"), "belong to no tensor"),
        (_safetensors({"a": _entry(0, 4, [1])}, b"12345678"), "after the last tensor"),
    ],
)
def test_malformed_safetensors_are_named(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        TensorFiles(tmp_path)
    assert "model.safetensors" in str(caught.value)


def test_an_index_that_disagrees_is_named(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "llama", shards=2)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    first = next(iter(content["weight_map"]))
    for file, words in (
        ("../model.safetensors", "points outside its folder"),
        ("model-00009-of-00009.safetensors", "is not there"),
    ):
        changed = {"weight_map": {**content["weight_map"], first: file}}
        index.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=words):
            TensorFiles(folder)
    index.write_text(
        json.dumps(
            {"weight_map": {**content["weight_map"], "ghost": "model-00001-of-00002.safetensors"}}
        )
    )
    with pytest.raises(UserError, match="places ghost in"):
        TensorFiles(folder)
    with pytest.raises(UserError, match=r"no model\*\.safetensors"):
        TensorFiles(tmp_path)
