"""Importance matrices: both of llama.cpp's forms, and what is wrong with a file."""

from __future__ import annotations

import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from convert.base.errors import UserError
from convert.gguf import imatrix

SUMS = {
    "blk.0.attn_q.weight": np.arange(8, dtype=np.float32).reshape(1, 8),
    "blk.0.ffn_down_exps.weight": np.arange(24, dtype=np.float32).reshape(3, 8),
}
COUNTS = {
    "blk.0.attn_q.weight": np.array([4.0]),
    "blk.0.ffn_down_exps.weight": np.array([2.0, 0.0, 8.0]),
}


def written(path: Path) -> Path:
    imatrix.write(path, SUMS, COUNTS, ["some prompts", "others"], tokens=700)
    return path


def legacy(path: Path, *, entries: int = 1, values: int = 8, tail: bytes = b"") -> Path:
    """llama.cpp's older form: sums of two calls for one tensor of 8 columns."""
    name = b"blk.0.attn_q.weight"
    body = struct.pack(f"<i{len(name)}sii", len(name), name, 2, values)
    sums = np.arange(8, dtype="<f4").tobytes()
    path.write_bytes(struct.pack("<i", entries) + body + sums + tail)
    return path


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = imatrix.read(written(tmp_path / "x.gguf"))
    assert found.datasets == ("some prompts", "others")
    assert found.chunks == 2
    np.testing.assert_array_equal(
        found.entries["blk.0.attn_q.weight"], np.arange(8)[None] / np.float32(4)
    )
    experts = found.entries["blk.0.ffn_down_exps.weight"]
    np.testing.assert_array_equal(experts[0], np.arange(8) / 2)
    np.testing.assert_array_equal(experts[1], np.ones(8))  # it saw no token
    np.testing.assert_array_equal(experts[2], np.arange(16, 24) / 8)


def test_the_file_is_as_llama_imatrix_writes_it(tmp_path: Path) -> None:
    reader = gguf.GGUFReader(written(tmp_path / "x.gguf"))
    keys = [key for key in reader.fields if not key.startswith("GGUF.")]
    assert keys == [
        "general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size",
    ]  # fmt: skip
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["some prompts", "others"]
    assert {tensor.name: list(map(int, tensor.shape)) for tensor in reader.tensors} == {
        "blk.0.attn_q.weight.in_sum2": [8, 1],
        "blk.0.attn_q.weight.counts": [1, 1],
        "blk.0.ffn_down_exps.weight.in_sum2": [8, 3],
        "blk.0.ffn_down_exps.weight.counts": [1, 3],
    }


@pytest.mark.parametrize(
    ("tail", "chunks", "datasets"),
    [(b"", 0, ()), (struct.pack("<ii4s", 5, 4, b"wiki"), 5, ("wiki",)), (b"\7\0\0\0", 7, ())],
)
def test_the_older_form(tmp_path: Path, tail: bytes, chunks: int, datasets: tuple[str]) -> None:
    found = imatrix.read(legacy(tmp_path / "x.dat", tail=tail))
    assert (found.chunks, found.datasets) == (chunks, datasets)
    np.testing.assert_array_equal(found.entries["blk.0.attn_q.weight"], np.arange(8)[None] / 2)


@pytest.mark.parametrize(
    ("entries", "values"), [(0, 8), (-1, 8), (1 << 30, 8), (2, 8), (1, 9), (1, 0), (1, -1)]
)
def test_a_damaged_older_form_is_refused(tmp_path: Path, entries: int, values: int) -> None:
    path = legacy(tmp_path / "x.dat", entries=entries, values=values)
    with pytest.raises(UserError, match=r"x\.dat is no importance matrix, or it is damaged"):
        imatrix.read(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_are_no_means_of_squares_are_refused(tmp_path: Path, value: float) -> None:
    sums = {"blk.0.x.weight": np.array([[1.0, value]])}
    imatrix.write(tmp_path / "x.gguf", sums, {"blk.0.x.weight": np.array([1.0])}, ["a"], 1)
    with pytest.raises(UserError, match=r"a value for blk\.0\.x\.weight that is no mean"):
        imatrix.read(tmp_path / "x.gguf")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file"):
        imatrix.read(tmp_path / "missing.gguf")
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("blk.0.x.weight", np.zeros((2, 2), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=r"model\.gguf is a GGUF, but no importance matrix"):
        imatrix.read(tmp_path / "model.gguf")
    with pytest.raises(UserError, match="exists"):
        imatrix.write(tmp_path / "model.gguf", SUMS, COUNTS, [], 1)


def test_shapes_are_those_of_the_model(tmp_path: Path) -> None:
    found = imatrix.read(written(tmp_path / "x.gguf"))
    weights = found.weights("blk.0.ffn_down_exps.weight", (3, 5, 8))
    assert weights is not None
    assert weights.shape == (3, 8)
    assert found.weights("blk.0.attn_k.weight", (5, 8)) is None
    with pytest.raises(UserError, match=r"8 values for blk\.0\.attn_q\.weight, which has 1 x 16"):
        found.weights("blk.0.attn_q.weight", (5, 16))
    found.check({"blk.0.attn_q.weight": (5, 8), "other": (2, 2)})
    with pytest.raises(UserError, match="has no tensor of this model, but blk"):
        found.check({"other": (2, 2)})


def test_an_embedding_of_another_size_is_ignored_as_in_llama_cpp(tmp_path: Path) -> None:
    name = "token_embd.weight"
    imatrix.write(tmp_path / "x.gguf", {name: np.ones((1, 4))}, {name: np.ones(1)}, [], 1)
    found = imatrix.read(tmp_path / "x.gguf")
    assert found.weights(name, (10, 8)) is None
    assert found.weights(name, (10, 4)) is not None
