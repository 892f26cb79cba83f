"""The direction file: what is written is read, and bad files are told in a sentence."""

import json
import re
import struct

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.directions.measuring import Candidates
from abl_mlx.outputs import record_parts
from convert.base.errors import UserError

RNG = np.random.default_rng(0)


def example():
    means = [mx.array(RNG.normal(size=(3, 2, 16)).astype(np.float32)) for _ in range(2)]
    candidates = Candidates(*means, (-2, -1))
    return DirectionFile(
        candidates.directions[1, 0][None], candidates, {"method": "x", "layer": 1, "seed": 1.5}
    )


def test_round_trip(tmp_path):
    file = example()
    direction_file.save(tmp_path / "d.safetensors", file)
    back = direction_file.read(tmp_path / "d.safetensors")
    np.testing.assert_array_equal(np.array(back.selected), np.array(file.selected))
    assert back.sha256 == file.sha256
    assert back.candidates.positions == (-2, -1)
    np.testing.assert_array_equal(
        np.array(back.candidates.directions), np.array(file.candidates.directions)
    )
    assert back.metadata["layer"] == 1
    assert back.metadata["seed"] == 1.5
    assert [p.name for p in tmp_path.iterdir()] == ["d.safetensors"]


def test_the_bytes_are_what_the_docs_say(tmp_path):
    """Read with nothing but the safetensors format: an 8-byte size, JSON, float32 data."""
    file = example()
    direction_file.save(tmp_path / "d.safetensors", file)
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
        np.array(direction_file.read(tmp_path / "v.npy").selected), vector[None]
    )
    mx.save_safetensors(str(tmp_path / "v.safetensors"), {"selected": mx.array(vector)})
    assert direction_file.read(tmp_path / "v.safetensors").selected.shape == (1, 16)


def test_bad_files_are_told_in_a_sentence(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{}")
    (tmp_path / "text.npy").write_text("hello")
    mx.save_safetensors(
        str(tmp_path / "other.safetensors"), {"a": mx.ones((4,)), "b": mx.ones((4,))}
    )
    np.save(tmp_path / "nan.npy", np.full(8, np.nan, np.float32))
    np.save(tmp_path / "cube.npy", np.ones((2, 2, 2), np.float32))
    (tmp_path / "d.txt").write_text("1 2 3")
    for name in ("missing.npy", "cut.safetensors", "text.npy", "other.safetensors", "nan.npy",
                 "cube.npy", "d.txt"):  # fmt: skip
        with pytest.raises(UserError, match=name):
            direction_file.read(tmp_path / name)


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"summary": {"refusal_score": {"harmful": 1}}}, "refusal_score.harmless is missing"),
        ({"summary": {"single": 3}}, "summary.single must be an object, not 3"),
        ({"summary": {"refusal_tokens": [1]}}, r"refusal_tokens\[0\] must be text, not 1"),
        ({"scores": [{"layer": 0}]}, r"scores\[0\].position is missing"),
        ({"scores": [{"layer": 0, "position": -1, "auc": "x"}]}, "auc must be a finite number"),
        ({"trials": [{"dropped": 1}]}, r"trials\[0\].dropped must be text, not 1"),
        ({"first_look": {"harmful": {"asked": 1}}}, "first_look.harmful.refused is missing"),
    ],
)
def test_what_a_record_takes_from_a_file_is_checked_when_it_is_read(metadata, said, tmp_path):
    file = DirectionFile(mx.ones((1, 16)), metadata=metadata)
    direction_file.save(tmp_path / "d.safetensors", file)
    with pytest.raises(UserError, match=rf"d\.safetensors cannot be used: its .*{said}.*again"):
        direction_file.read(tmp_path / "d.safetensors")


def test_figures_that_are_not_known_and_keys_that_are_new_do_not_matter(tmp_path):
    summary = {"method": "x", "layer": None, "validation_kl": float("nan"), "added": [1]}
    file = DirectionFile(mx.ones((1, 16)), metadata={"summary": summary})
    direction_file.save(tmp_path / "d.safetensors", file)
    found = record_parts.chosen(direction_file.read(tmp_path / "d.safetensors"))
    assert (found.layer, found.validation_kl, found.more) == (None, None, {"added": [1]})
    assert found.json == {**summary, "validation_kl": None, "sha256": found.sha256}


# --- directions of other origin ----------------------------------------------------------------


def control_vector(path, vectors):
    """A control vector as llama.cpp's generator writes it: direction.N, N from 1."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_int32("controlvector.layer_count", len(vectors))
    for number, vector in vectors.items():
        writer.add_tensor(f"direction.{number}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_outside_directions_of_every_form(tmp_path):
    rows = RNG.normal(size=(3, 16)).astype(np.float32)
    np.save(tmp_path / "double.npy", rows[0].astype(np.float64))
    np.savez(tmp_path / "one.npz", anything=rows[:2])
    np.savez(tmp_path / "two.npz", a=rows[0], b=rows[1])
    mx.save_safetensors(
        str(tmp_path / "sae.safetensors"), {"W_dec": mx.array(rows).astype(mx.bfloat16)}
    )
    mx.save_safetensors(
        str(tmp_path / "two.safetensors"), {"a": mx.array(rows[0]), "b": mx.array(rows)}
    )
    control_vector(tmp_path / "cv.gguf", {1: rows[0], 2: rows[1], 3: rows[2]})
    control_vector(tmp_path / "single.gguf", {5: rows[2]})

    def read(name, **chosen):
        return np.array(direction_file.read(tmp_path / name, **chosen).selected)

    np.testing.assert_allclose(read("double.npy"), rows[:1])
    np.testing.assert_array_equal(read("one.npz"), rows[:2])
    np.testing.assert_array_equal(read("two.npz", tensor="b"), rows[1:2])
    np.testing.assert_allclose(read("sae.safetensors"), rows, rtol=1e-2)
    np.testing.assert_array_equal(read("two.safetensors", tensor="a"), rows[:1])
    for layer in (1, 2, 3):
        np.testing.assert_array_equal(read("cv.gguf", layer=layer), rows[layer - 1 : layer])
    np.testing.assert_array_equal(read("single.gguf"), rows[2:])
    # A file that holds a direction for each layer, and one by its own tensor's name.
    mx.save_safetensors(str(tmp_path / "each.safetensors"), {"selected": mx.array(rows[:, None])})
    assert read("each.safetensors").shape == (3, 1, 16)


@pytest.mark.parametrize(
    ("name", "chosen", "message"),
    [
        ("model.pt", {}, "pickle"),
        ("two.npz", {}, "a, b"),
        ("two.npz", {"tensor": "c"}, "'c'"),
        ("two.npz", {"layer": 1}, "--layer 1"),
        ("v.npy", {"tensor": "a"}, "--tensor a"),
        ("zero.npy", {}, "points nowhere"),
        ("words.npy", {}, "made of numbers"),
        ("objects.npy", {}, "objects.npy"),
        ("cv.gguf", {}, "1 to 2"),
        ("cv.gguf", {"layer": 0}, "1 to 2"),
        ("cv.gguf", {"layer": 1.5}, "--layer 1.5"),
        ("cv.gguf", {"tensor": "direction.1"}, "--layer"),
        ("bad.gguf", {}, "bad.gguf"),
        ("bad.npz", {}, "bad.npz"),
        ("other.gguf", {}, "no control vector"),
        ("own.safetensors", {"layer": 2}, "--layer 2"),
    ],
)
def test_outside_directions_that_cannot_be_taken(name, chosen, message, tmp_path):
    vector = RNG.normal(size=16).astype(np.float32)
    (tmp_path / "model.pt").write_bytes(b"PK")
    np.savez(tmp_path / "two.npz", a=vector, b=vector)
    np.save(tmp_path / "v.npy", vector)
    np.save(tmp_path / "zero.npy", np.zeros(8))
    np.save(tmp_path / "words.npy", np.array(["a", "b"]))
    np.save(tmp_path / "objects.npy", np.array([{}, 1], dtype=object), allow_pickle=True)
    control_vector(tmp_path / "cv.gguf", {1: vector, 2: vector})
    (tmp_path / "bad.gguf").write_bytes(b"GGUF nothing else")
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 nothing else")
    direction_file.save(tmp_path / "own.safetensors", example())
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "other.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((2, 16), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match=re.escape(message)):
        direction_file.read(tmp_path / name, **chosen)
