"""Whatever a file from outside holds, it is used or refused in one sentence that names it."""

from __future__ import annotations

import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.behaviour import journal
from abl_mlx.cli.main import cli
from abl_mlx.directions import direction_file
from abl_mlx.models.chat_model import load_lazily
from abl_mlx.outputs import undo_file
from convert.base import escape, json_text
from convert.base.errors import UserError
from convert.base.hf_config import read_config
from convert.base.schema import (
    Refused,
    either,
    list_of,
    map_of,
    number,
    one_of,
    record,
    text,
    whole,
)
from convert.gguf.file import GgufSource
from convert.gguf.values import encode_pair
from convert.mlx.safetensors_files import TensorFiles
from convert.tokenizers.to_gguf import read_tokenizer
from tests.support.command import abl_mlx, fails

# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "not valid JSON .*line 1, column 1"),
        (b'{"a": 1,\n "b" 2}', "line 2, column 6"),
        (b'{"a": "\xff"}', "not UTF-8 at byte 7, line 1"),
        (b'\n\n{"a": "\xc3"}', "not UTF-8 at byte 9, line 3"),
        ("﻿{}".encode(), "not valid JSON"),
        (b"[" * 100_000, "nested deeper|nests deeper"),
        (b"[" * 500 + b"]" * 500, "nests deeper than 100"),
        (b'{"a":' * 200 + b"1" + b"}" * 200, "nests deeper than 100"),
        (b"[" + b"9" * 5000 + b"]", "a number of 5000 digits"),
        (b"[-1e999]", "-1e999, which is too large"),
        (b"[NaN]", "NaN"),
        (b"[Infinity]", "Infinity"),
        (b'{"a": 1, "a": 2}', '"a" appears twice'),
        (b'{"x\x1b": 1}', "not valid JSON"),
        (b'["\\ud800"]', "half a character"),
        (b'{"\\udfff": 1}', "half a character"),
        (b"[" + b"[]," * (1 << 22) + b"[]]", "more than 4194304 values"),
    ],
)
def test_json_is_bounded(data: bytes, why: str) -> None:
    with pytest.raises(Refused, match=why):
        json_text.parse(data)


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b'{"a": [1, 2.5, "\\ud83d\\ude00", null, true]}', {"a": [1, 2.5, "😀", None, True]}),
        # transformers' "no limit"
        (b"1000000000000000019884624838656", 1000000000000000019884624838656),
        (b'{"a": 1, "a": 1}', {"a": 1}),
        (b"[" * 99 + b"]" * 99, None),
    ],
)
def test_other_json_is_what_python_reads(data: bytes, value: Any) -> None:
    assert json_text.parse(data) == (json.loads(data) if value is None else value)


def test_an_infinite_limit_is_a_state_space_models() -> None:
    assert json_text.parse(b'{"time_step_limit": [0.0, Infinity]}', infinite=True)
    with pytest.raises(Refused, match="NaN"):
        json_text.parse(b"NaN", infinite=True)


KIND = record(
    {"size": whole(1, 9), "share": number(0, 1), "names": list_of(text(r"\w+", "a word"))},
    {"kind": one_of(["a", "b"]), "more": map_of(either(whole(), record({}, {"deep": whole()})))},
)


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([], "it must be an object, not a list of 0"),
        ({}, "its kind is missing"),
        ({"kind": "c", "more": {}}, 'its kind must be "a" or "b", not "c"'),
        (
            {"kind": "a", "more": {}, "size": 0},
            "its size must be a whole number from 1 to 9, not 0",
        ),
        ({"kind": "a", "more": {}, "size": True}, "its size must be .* not true"),
        ({"kind": "a", "more": {}, "size": 2.0}, "its size must be"),
        ({"kind": "a", "more": {}, "share": 1.5}, "its share must be a finite number"),
        ({"kind": "a", "more": {}, "share": 10**400}, "its share must be"),
        (
            {"kind": "a", "more": {}, "names": ["x", "\x1b["]},
            r"its names\[1\] must be a word, not ",
        ),
        ({"kind": "a", "more": {"x": {}}}, r"its more\.x\.deep is missing"),
        ({"kind": "a", "more": {"x": {"deep": "1"}}}, r"its more\.x\.deep must be a whole number"),
    ],
)
def test_a_schema_names_the_place(value: Any, why: str) -> None:
    with pytest.raises(Refused, match=f"^{why}") as caught:
        json_text.check(value, KIND)
    assert str(caught.value).isprintable()


# --- config.json ---------------------------------------------------------------------------------


def changed(folder: Path, to: Path, file: str, change: Callable[[Any], Any]) -> Path:
    """A copy of a folder with a JSON file of it changed."""
    shutil.copytree(folder, to)
    path = to / file
    value = change(json.loads(path.read_text()))
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return to


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be a whole number"),
        ({"num_hidden_layers": 60_000}, "num_hidden_layers is 60000, but the tensors are of 3"),
        ({"num_attention_heads": 10**8}, "num_attention_heads is 100000000, but no tensor"),
        ({"vocab_size": 2**31 - 1}, "vocab_size is 2147483647, but no tensor"),
        ({"head_dim": 2**30}, "head_dim is 1073741824, but no tensor"),
        ({"num_hidden_layers": "{{ 1/0 }}"}, 'num_hidden_layers must be .* not "{{ 1/0 }}"'),
        ({"hidden_size": 0}, "hidden_size must be a whole number from 1"),
        ({"rms_norm_eps": "x"}, "rms_norm_eps must be a finite number"),
        ({"rope_theta": 0}, "rope_theta must be a finite number above 0"),
        ({"rope_scaling": True}, "rope_scaling must be an object, not true"),
        ({"rope_scaling": {"factor": "8"}}, "rope_scaling.factor must be"),
        ({"architectures": 10_000_000}, "architectures must be text or a list"),
        ({"text_config": []}, "text_config must be an object, not a list of 0"),
        ({"text_config": {"num_hidden_layers": -1}}, "text_config.num_hidden_layers must be"),
        ({"quantization": {"bits": "4"}}, "quantization.bits must be"),
        ({"eos_token_id": ["x"]}, r"eos_token_id must be|eos_token_id\[0\] must be"),
        ({"model_type": "switch_layers"}, "no architecture named 'switch_layers'"),
        ({"model_type": "cache"}, "no architecture named 'cache'"),
        ({"model_type": "../../x"}, "names no model_type"),
        ({"num_key_value_heads": 0}, "could not be loaded as llama"),
    ],
)
def test_a_config_that_lies_is_refused(
    values: dict[str, Any], said: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = changed(
        tiny_folder("llama"), tmp_path / "m", "config.json", lambda one: {**one, **values}
    )
    with pytest.raises(UserError, match=said) as caught:
        load_lazily(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda one: one.pop("num_attention_heads"), "has no num_attention_heads"),
        (lambda one: one.update(num_attention_heads=3), "rows, which are not those of 3 heads"),
        (lambda one: one.update(num_attention_heads=[4, 4]), "num_attention_heads must be a whole"),
        (lambda one: one.update(rope_theta=[1e4]), "rope_theta must be a finite number"),
        (lambda one: one.update(rope_scaling={"type": "linear"}), "has no factor"),
        (
            lambda one: one.update(rope_scaling={"rope_type": "llama3", "factor": 8,
                                                 "low_freq_factor": 5, "high_freq_factor": 4}),
            "above its high_freq_factor",
        ),
    ],
)  # fmt: skip
def test_a_config_without_what_a_gguf_needs(
    change: Callable[[Any], Any], said: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    def changing(config: Any) -> Any:
        change(config)
        return config

    folder = changed(tiny_folder("llama"), tmp_path / "m", "config.json", changing)
    assert said in fails("convert", folder, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_a_config_that_is_no_json_is_named(
    file: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    (folder / file).write_text("[" * 5000)
    with pytest.raises(UserError, match=f"{file} cannot be used: it is not valid JSON"):
        read_config(folder)


# --- safetensors ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("index", "said"),
    [
        ("[" * 50_000, "not valid JSON"),
        ("{}", "weight_map is missing"),
        ('{"weight_map": {"a": 1}}', "weight_map.a must be the name of a file"),
        ('{"weight_map": {"a": "../x"}}', "points outside its folder"),
        ('{"weight_map": []}', "weight_map must be an object"),
    ],
)
def test_an_index_is_checked(index: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=said) as caught:
        TensorFiles(tmp_path)
    assert "model.safetensors.index.json" in str(caught.value)


@pytest.mark.parametrize("shape", [[10**39], [2**62] * 300, [1] * 100])
def test_a_shape_of_a_header_is_bounded(shape: list[int], tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(UserError, match=r"model\.safetensors .*malformed shape"):
        TensorFiles(tmp_path)


@pytest.mark.parametrize("dtype", ["x" * 10_000, ["F32"] * 3_000, 7])
def test_a_type_of_a_header_is_quoted_in_part(dtype: object, tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": dtype, "shape": [1], "data_offsets": [0, 4]}}).encode()
    file = tmp_path / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(header)) + header + b"\0" * 4)
    with pytest.raises(UserError, match="which is not supported") as caught:
        TensorFiles(tmp_path)
    assert len(str(caught.value)) < 300 + len(str(file))


# --- tokenizers ----------------------------------------------------------------------------------


def _set(value: Any, *path: Any) -> Callable[[Any], Any]:
    def change(document: Any) -> Any:
        at = document
        for step in path[:-1]:
            at = at[step]
        at[path[-1]] = value
        return document

    return change


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("tokenizer.json", lambda one: "[" * 9000, "not valid JSON"),
        ("tokenizer.json", _set([], "model"), "model must be an object"),
        ("tokenizer.json", _set(None, "model", "vocab"), "has no model.vocab"),
        ("tokenizer.json", _set("x", "model", "vocab", "zz"), "model.vocab.zz must be a whole"),
        ("tokenizer.json", _set(1e999, "model", "vocab", "zz"), "Infinity|infinit|whole"),
        ("tokenizer.json", _set(2**40, "model", "vocab", "zz"), "model.vocab.zz must be a whole"),
        ("tokenizer.json", _set("ab", "model", "merges", 0), r"model.merges\[0\] must be"),
        ("tokenizer.json", _set([1, 2], "model", "merges", 0), r"model.merges\[0\]\[0\] must be"),
        ("tokenizer.json", _set(3.5, "model", "merges", 0), r"model.merges\[0\] must be"),
        ("tokenizer.json", _set([7], "added_tokens"), r"added_tokens\[0\] must be an object"),
        ("tokenizer.json", _set([{}], "added_tokens"), r"added_tokens\[0\].id is missing"),
        ("tokenizer.json", _set(5, "added_tokens"), "added_tokens must be a list"),
        (
            "tokenizer.json",
            _set({"type": "TemplateProcessing", "single": [1]}, "post_processor"),
            r"post_processor.single\[0\] must be an object",
        ),
        (
            "tokenizer.json",
            _set({"type": "Sequence", "pretokenizers": [[]]}, "pre_tokenizer"),
            r"pre_tokenizer.pretokenizers\[0\] must be an object",
        ),
        (
            "tokenizer_config.json",
            _set({"": {"content": "x"}}, "added_tokens_decoder"),
            "must be the number of a token",
        ),
        ("tokenizer_config.json", _set(0.5, "added_tokens_decoder"), "must be an object, not 0.5"),
    ],
)
def test_a_tokenizer_that_lies_is_refused(
    file: str,
    change: Callable[[Any], Any],
    said: str,
    tiny_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    folder = changed(tiny_folder("llama"), tmp_path / "m", file, change)
    with pytest.raises(UserError, match=said) as caught:
        read_tokenizer(folder)
    assert str(folder / file) in str(caught.value)


def test_a_template_that_is_no_text_is_named(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "m")
    (folder / "chat_template.jinja").write_bytes(b"{{ x }}\n\xff")
    with pytest.raises(UserError, match=r"chat_template\.jinja cannot be used: it is not UTF-8 at"):
        read_tokenizer(folder)


def test_a_gap_in_a_vocabulary_is_not_filled(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    far = _set((1 << 24) - 1, "model", "vocab", "zz")
    folder = changed(tiny_folder("llama"), tmp_path / "m", "tokenizer.json", far)
    with pytest.raises(UserError, match="the last of 16777216 is numbered"):
        read_tokenizer(folder)


def test_a_sentencepiece_number_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x80" * 1_000_000)
    with pytest.raises(UserError, match=r"tokenizer\.model is no SentencePiece model"):
        read_tokenizer(tmp_path)


# --- directions ----------------------------------------------------------------------------------


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def header(text: str, data: bytes = b"") -> bytes:
    raw = text.encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(raw)) + raw + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x93NUMPY",
        b"PK\x03\x04",
        npy(np.array([1, "a"], dtype=object)),
        npy(np.array(["a", "b"])),
        npy(np.ones(4, np.complex64)),
        npy(np.ones(4))[:-1],
        npy(np.ones(4)) + b"x",
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999,), }"),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", b"\0" * 4),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (1"),
        header("(" * 9000),
        header("{'descr': __import__('os'), }"),
        header("{'descr': '|O', 'fortran_order': False, 'shape': (1,), }", b"\0" * 8),
    ],
)
def test_an_array_is_checked(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "d.npy").write_bytes(data)
    with pytest.raises(UserError, match=r"d\.npy"):
        direction_file.read(tmp_path / "d.npy")


def zipped(members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return stream.getvalue()


def test_an_archive_is_checked(tmp_path: Path) -> None:
    one = npy(np.arange(1, 65, dtype=np.float32))
    good = zipped([("a.npy", one)], zipfile.ZIP_STORED)
    at = good.index(one)
    wrong = good[: at + 90] + b"\xff" + good[at + 91 :]  # a checksum that does not fit
    deflated = zipped([("a.npy", one)])
    packed = deflated[:45] + b"\xff\xff\xff" + deflated[48:]
    cases = {
        "no zip": b"not a zip",
        "checksum": wrong,
        "data": packed,
        "method": zipped([("a.npy", one)], zipfile.ZIP_BZIP2),
        "no array": zipped([("a.npy", b"hello")]),
        "object": zipped([("a.npy", npy(np.array([None])))]),
        "bomb": zipped([("a.npy", header(
            "{'descr': '<f4', 'fortran_order': False, 'shape': (33554432,), }", bytes(1 << 27)
        ))]),
    }  # fmt: skip
    for name, data in cases.items():
        (tmp_path / "d.npz").write_bytes(data)
        with pytest.raises(UserError, match=r"d\.npz"):
            _ = name, direction_file.read(tmp_path / "d.npz")
    (tmp_path / "d.npz").write_bytes(good)
    assert direction_file.read(tmp_path / "d.npz").selected.shape == (1, 64)
    (tmp_path / "d.npz").write_bytes(zipped([("a.npy", one), ("b.npy", one)]))
    chosen = direction_file.read(tmp_path / "d.npz", tensor="b")
    np.testing.assert_array_equal(np.array(chosen.selected), np.arange(1, 65)[None])


def test_arrays_of_either_order_and_several_types(tmp_path: Path) -> None:
    values = np.arange(1, 13).reshape(3, 4)
    for kind in ("<f2", "<f4", ">f4", "<f8", "<i2", "|u1"):
        for array in (values.astype(kind), np.asfortranarray(values.astype(kind))):
            (tmp_path / "d.npy").write_bytes(npy(array))
            found = direction_file.read(tmp_path / "d.npy").selected
            np.testing.assert_array_equal(np.array(found), values)


SELECTED = {"selected": mx.ones((1, 8))}
MEANS = {"harmful_mean": mx.ones((2, 1, 8)), "harmless_mean": mx.zeros((2, 1, 8))}


@pytest.mark.parametrize(
    ("tensors", "metadata", "said"),
    [
        (SELECTED, {"summary": "[1]"}, "summary must be an object"),
        (SELECTED, {"summary": '{"layer": "x"}'}, "summary.layer must be"),
        (SELECTED, {"recipe": '{"profile": {"mlp": [1]}}'}, "recipe.profile.attention is missing"),
        (SELECTED, {"recipe": '{"profile": {"mlp": ["x"], "attention": []}}'}, r"mlp\[0\] must be"),
        (SELECTED, {"pins": "{}"}, "pins.harmful is missing"),
        (SELECTED, {"scores": "{}"}, "scores must be a list"),
        (SELECTED | MEANS, {"positions": "[-2, -1]"}, "2 positions, but its means are of 1"),
        (SELECTED | MEANS, {"positions": '["x"]'}, r"positions\[0\] must be"),
        (SELECTED | MEANS | {"harmless_mean": mx.zeros((2, 8))}, {}, "`harmless_mean` must be"),
        (SELECTED | {"harmful_cloud": mx.ones((2, 3)), "harmless_cloud": mx.ones((2, 2))}, {},
         "`harmful_cloud` must be"),
        ({"selected": mx.zeros((0, 8))}, {}, "`selected` must be"),
    ],
)  # fmt: skip
def test_a_direction_file_is_checked(
    tensors: dict[str, mx.array], metadata: dict[str, str], said: str, tmp_path: Path
) -> None:
    file = tmp_path / "d.safetensors"
    mx.save_safetensors(str(file), tensors, metadata)
    with pytest.raises(UserError, match=said) as caught:
        direction_file.read(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("layouts", "said"),
    [
        ("[" * 5000, "not valid JSON"),
        ("[]", "must be an object"),
        ('{"a": [1, 2]}', r"a must be \[axis, transposed, strength\]"),
        ('{"a": [-1, false, "x"]}', r"a\[2\] must be a finite number"),
        ('{"a": [0, false, 1.0]}', r"a\[0\] must be -1 or -2"),
        ('{"a": [-1, false, 1.0]}', "lacks what was taken of a"),
    ],
)
def test_an_undo_file_is_checked(layouts: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "undo.safetensors"
    metadata = {"tensors": layouts, "direction_sha256": "0"}
    mx.save_safetensors(str(file), {"b.along": mx.ones(2)}, metadata)
    with pytest.raises(UserError, match=said) as caught:
        undo_file.read_kept(file, "0")
    assert str(file) in str(caught.value)


def test_an_undo_file_of_other_shapes_is_refused(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    basis = np.eye(1, 64, dtype=np.float32)
    np.save(tmp_path / "d.npy", basis)
    edited = tmp_path / "edited"
    abl_mlx("apply", tmp_path / "d.npy", tiny_folder("llama", dtype="float32"), "-o", edited,
            "--keep-undo")  # fmt: skip
    tensors, metadata = mx.load(str(edited / "undo.safetensors"), return_metadata=True)  # type: ignore[misc]
    layouts = json.loads(metadata["tensors"])
    name = next(name for name in layouts if "down_proj" in name)
    layouts[name][0] = -1
    metadata["tensors"] = json.dumps(layouts)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), tensors, metadata)
    said = fails(
        "undo", edited, "-o", tmp_path / "out", "--factors", tmp_path / "other.safetensors"
    )
    assert f"{name} in {edited} has the shape" in said
    assert not (tmp_path / "out").exists()


# --- journals ------------------------------------------------------------------------------------

HEAD = '{"journal": 1, "role": "target", "identity": {}}\n'


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("[" * 50_000 + "\n", "line 1, it is not valid JSON"),
        ('{"journal": 1, "role": "target", "identity": 7}\n', "line 1, its identity must be"),
        (HEAD + "7\n", "line 2, it must be an object"),
        (HEAD + '{"role": "target", "prompt": "a", "verdict": "x"}\n', "line 2, its verdict must"),
        (HEAD + '{"role": "other", "prompt": "a", "verdict": null}\n', "its role has not begun"),
        (HEAD + '{"role": "target", "prompt": [], "verdict": null}\n', "its prompt must be text"),
        (HEAD + "\xff\n", "line 2, it is not"),
        ("no line end", "no line that is whole"),
    ],
)
def test_a_journal_is_checked(lines: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_bytes(lines.encode("latin-1"))
    before = path.read_bytes()
    with pytest.raises(UserError, match=said) as caught:
        journal.Journal(path, strict=True)
    assert str(path) in str(caught.value)
    assert path.read_bytes() == before


# --- GGUF ----------------------------------------------------------------------------------------


def gguf(tmp_path: Path, pairs: list[tuple[str, Any]], blocks: int = 2) -> Path:
    """A GGUF with these metadata and a small tensor in each of so many blocks."""
    names = [f"blk.{block}.attn_norm.weight".encode() for block in range(blocks)]
    entries = b"".join(
        struct.pack("<Q", len(name)) + name + struct.pack("<IQIQ", 1, 8, 0, 32 * n)
        for n, name in enumerate(names)
    )
    keys = [("general.architecture", "llama"), *pairs]
    head = b"GGUF" + struct.pack("<IQQ", 3, blocks, len(keys))
    head += b"".join(encode_pair(key, value) for key, value in keys) + entries
    path = tmp_path / "m.gguf"
    path.write_bytes(head + b"\0" * (-len(head) % 32) + b"\0" * 32 * blocks)
    return path


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("llama.block_count", "x", 'llama.block_count must be a whole number from 0 to .* not "x"'),
        ("llama.block_count", [1, 2], "llama.block_count must be"),
        ("llama.block_count", 2**31, "llama.block_count must be"),
        ("llama.block_count", 60_000, "block_count is 60000, but its tensors are of 2 blocks"),
        ("llama.embedding_length", float("inf"), "llama.embedding_length must be"),
        ("llama.attention.head_count", "<b>\x1b[1m", r"head_count must be .* not .<b>\\x1b\[1m"),
        ("llama.attention.layer_norm_rms_epsilon", float("nan"), "rms_epsilon must be a finite"),
        ("tokenizer.ggml.tokens", "x", "tokenizer.ggml.tokens must be a list of texts"),
        ("tokenizer.ggml.tokens", [1, 2], "tokenizer.ggml.tokens must be a list of texts"),
        ("tokenizer.ggml.token_type", ["a"], "token_type must be a list of whole numbers"),
        ("tokenizer.ggml.scores", ["a"], "scores must be a list of numbers"),
        ("tokenizer.ggml.eos_token_id", "x", "eos_token_id must be a whole number"),
        ("tokenizer.ggml.add_bos_token", "yes", "add_bos_token must be true or false"),
        ("tokenizer.chat_template", 7, "tokenizer.chat_template must be text"),
        ("general.tags", ["a", "b"], ""),
        ("general.tags", 5, "general.tags must be a list"),
        ("general.base_model.count", "1", "general.base_model.count must be a whole number"),
    ],
)
def test_metadata_of_a_gguf_are_checked(key: str, value: Any, said: str, tmp_path: Path) -> None:
    path = gguf(tmp_path, [(key, value)])
    if not said:
        assert GgufSource(path).metadata[key] == value
        return
    with pytest.raises(UserError, match=said) as caught:
        GgufSource(path)
    assert str(path) in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_control_vector_is_checked(tmp_path: Path) -> None:
    path = gguf(tmp_path, [("controlvector.layer_count", "?")])
    with pytest.raises(UserError, match=r"controlvector\.layer_count must be a whole number"):
        direction_file.read(path)
    with pytest.raises(UserError, match="no control vector: it has no tensor direction"):
        direction_file.read(gguf(tmp_path, []))


# --- escaping ------------------------------------------------------------------------------------


def test_text_for_a_line_of_a_terminal() -> None:
    assert escape.line("a\x1b[31mb\nc\x9bd‮e\udcfff\x00") == (r"a\x1b[31mb\nc\x9bd\u202ee\xfff\x00")
    assert escape.line("naïve – 模型 👩‍🚀 עברית") == "naïve – 模型 👩‍🚀 עברית"


def test_text_for_several_lines_keeps_their_ends() -> None:
    assert escape.block("a\r\nb\tc\x1b]0;x\x07\rd") == "a\nb\tc\\x1b]0;x\\x07\\rd"


def test_json_stays_the_same_value() -> None:
    value = {"a\u202e": ["\x9b31m", "\U000e0041", "ok 模型\n"]}
    safe = escape.json_text(json.dumps(value, ensure_ascii=False))
    assert json.loads(safe) == value
    assert escape.block(safe) == safe


@pytest.mark.parametrize(
    "name", ["plain-1.5B_q4", "true", "a: b", "x\ny: z", '"', "# no", "1e5", "\u202e", "模型"]
)
def test_a_yaml_scalar_is_read_back(name: str) -> None:
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(f"a: {escape.yaml(name)}\nb: 1") == {"a": name, "b": 1}


def test_markdown_holds_no_markup_of_a_name() -> None:
    assert escape.markdown("# [x](y) <b>`c`*d* _e_") == r"\# \[x\](y) \<b\>\`c\`\*d\* \_e\_"
    assert escape.markdown("Qwen2.5-Coder_0.5B") == "Qwen2.5-Coder_0.5B"
    assert escape.markdown("a\n# b") == r"a\\n# b"
    assert escape.code("plain") == "`plain`"
    assert escape.code("a`b``c\n") == r"``` a`b``c\n ```"


def test_names_on_a_page_cannot_turn_its_letters_around() -> None:
    assert escape.html("<b>\u202e&\x1b") == r"&lt;b&gt;\u202e&amp;\x1b"


# --- the command line ----------------------------------------------------------------------------


def test_a_sentence_holds_nothing_that_a_terminal_obeys(tmp_path: Path) -> None:
    folder = tmp_path / "a\x1b[31m\u202eb\nc"
    folder.mkdir()
    said = fails("inspect", folder)
    assert r"a\x1b[31m\u202eb\nc has no config.json" in said
    assert said.strip().isprintable()


def test_a_table_holds_nothing_that_a_terminal_obeys(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    from click.testing import CliRunner

    from abl_mlx.cli.main import cli

    folder = shutil.copytree(tiny_folder("llama"), tmp_path / "a\x1b]0;x\x07\u202e")
    told = CliRunner().invoke(cli, ["inspect", str(folder)])
    assert told.exit_code == 0
    assert r"a\x1b]0;x\x07\u202e" in told.stdout
    assert all(line.isprintable() for line in told.output.splitlines())
    as_json = CliRunner().invoke(cli, ["inspect", str(folder), "--json"]).stdout
    assert all(line.isprintable() for line in as_json.splitlines())
    assert json.loads(as_json)["source"] == str(folder)


@pytest.mark.parametrize("locale", [{}, {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}])
def test_a_prompt_in_any_locale(locale: dict[str, str]) -> None:
    def show(prompt: bytes) -> subprocess.CompletedProcess[bytes]:
        command = [os.fsencode(sys.executable), b"-m", b"abl_mlx", b"show", b"demo", prompt]
        environment = {**os.environ, "LC_ALL": "C", **locale}
        return subprocess.run([*command, b"--json"], capture_output=True, env=environment)

    prompt = "Wie geht es, Jürgen? 模型 😀"
    told = show(prompt.encode())
    assert told.returncode == 0, told.stderr.decode()
    assert json.loads(told.stdout)["prompt"] == prompt
    told = show(b"\xff")
    assert told.returncode == 1
    assert told.stderr == b"Error: PROMPT is not UTF-8 at byte 0: type it anew.\n"


def test_a_fault_of_ours_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from abl_mlx.cli import main
    from abl_mlx.support import interrupts

    def fault() -> None:
        raise KeyError("a\x1b[31m\n")

    monkeypatch.setattr(main, "cli", fault)
    monkeypatch.setattr(interrupts, "listen", lambda: None)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Error: internal error: KeyError at ")
    assert "ABL_MLX_TRACEBACK=1" in said
    assert said.strip().isprintable()
    monkeypatch.setenv(main.TRACEBACK, "1")
    with pytest.raises(KeyError):
        main.main()


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        # What MLX raises on Metal.
        RuntimeError(
            "[metal::malloc] Attempting to allocate 17179869184 bytes which is greater than the "
            "maximum allowed buffer size of 14302248960 bytes."
        ),
    ],
)
def test_too_little_memory_is_one_sentence(
    error: Exception, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from abl_mlx.commands import measure_apply

    def large(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(measure_apply, "measure", large)
    out = str(tmp_path / "d.safetensors")
    result = CliRunner().invoke(cli, ["measure", "demo", "-o", out])
    assert result.exit_code == 1
    assert result.output.startswith("Error: not enough memory: choose a smaller model")
