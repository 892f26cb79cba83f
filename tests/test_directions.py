"""The direction file: what is written is read, and bad files are told in a sentence."""

import json
import struct

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx import directions
from abl_mlx.directions import Candidates, DirectionFile
from convert.errors import UserError

RNG = np.random.default_rng(0)


def example():
    means = [mx.array(RNG.normal(size=(3, 2, 16)).astype(np.float32)) for _ in range(2)]
    candidates = Candidates(*means, (-2, -1))
    return DirectionFile(
        candidates.directions[1, 0][None], candidates, {"method": "x", "layer": 1, "scores": [1.5]}
    )


def test_round_trip(tmp_path):
    file = example()
    directions.save(tmp_path / "d.safetensors", file)
    back = directions.read(tmp_path / "d.safetensors")
    np.testing.assert_array_equal(np.array(back.selected), np.array(file.selected))
    assert back.sha256 == file.sha256
    assert back.candidates.positions == (-2, -1)
    np.testing.assert_array_equal(
        np.array(back.candidates.directions), np.array(file.candidates.directions)
    )
    assert back.metadata["layer"] == 1
    assert back.metadata["scores"] == [1.5]
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_the_bytes_are_what_the_docs_say(tmp_path):
    """Read with nothing but the safetensors format: an 8-byte size, JSON, float32 data."""
    file = example()
    directions.save(tmp_path / "d.safetensors", file)
    raw = (tmp_path / "d.safetensors").read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + size])
    metadata = header.pop("__metadata__")
    assert metadata["format"] == "abl-mlx direction"
    assert json.loads(metadata["positions"]) == [-2, -1]
    assert set(header) == {"selected", "candidates", "harmful_mean", "harmless_mean"}
    assert header["selected"]["dtype"] == "F32"
    assert header["selected"]["shape"] == [1, 16]
    start, stop = header["selected"]["data_offsets"]
    values = np.frombuffer(raw[8 + size + start : 8 + size + stop], "<f4")
    np.testing.assert_array_equal(values, np.array(file.selected)[0])


def test_a_bare_vector_is_a_direction(tmp_path):
    vector = RNG.normal(size=16).astype(np.float32)
    np.save(tmp_path / "v.npy", vector)
    np.testing.assert_array_equal(
        np.array(directions.read(tmp_path / "v.npy").selected), vector[None]
    )
    mx.save_safetensors(str(tmp_path / "v.safetensors"), {"selected": mx.array(vector)})
    assert directions.read(tmp_path / "v.safetensors").selected.shape == (1, 16)


def test_bad_files_are_told_in_a_sentence(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "text.npy").write_text("hello")
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"a": mx.ones((4,)), "b": mx.ones((4,))})
    np.save(tmp_path / "nan.npy", np.full(8, np.nan, np.float32))
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2), np.float32))
    (tmp_path / "d.txt").write_text("1 2 3")
    for name in ("missing.npy", "cut.safetensors", "text.npy", "other.safetensors", "nan.npy",
                 "cube.npy", "d.txt"):  # fmt: skip
        with pytest.raises(UserError, match=name):
            directions.read(tmp_path / name)
