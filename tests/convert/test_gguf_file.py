"""GGUF files read and written again: what does not change keeps its bytes, what does is right."""

from __future__ import annotations

import errno
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType as V

from convert.base.errors import UserError
from convert.gguf import file, pieces
from convert.gguf import rewrite as gguf_rewrite
from convert.gguf.file import GgufSource
from convert.gguf.parts import part_paths
from convert.gguf.rewrite import rewrite
from tests.convert.test_gguf_fuzz import (
    array,
    entry,
    gguf_bytes,
    pair,
    small_files,
    string,
)
from tests.support import tiny
from tests.support.odd_ggufs import odd_files, split

# --------------------------------------------------------------------------------------------------
# Reading


def test_reads_what_gguf_py_reads(tmp_path: Path, model: Path) -> None:
    for path in (*small_files(tmp_path)[:2], model):
        reader = gguf.GGUFReader(path)
        with GgufSource(path) as source:
            assert source.parts == [path]
            assert source.architecture == reader.fields["general.architecture"].contents()
            ours = {key: value for key, value in source.metadata.items() if "nested" not in key}
            theirs = {
                key: field.contents()
                for key, field in reader.fields.items()
                if not key.startswith("GGUF.") and "nested" not in key
            }
            assert ours == theirs
            assert list(ours) == list(theirs)
            assert list(source.tensors) == [tensor.name for tensor in reader.tensors]
            for tensor in reader.tensors:
                found = source.tensors[tensor.name]
                assert found.type == tensor.tensor_type
                assert found.shape == tuple(reversed(tensor.shape.tolist()))
                assert (found.offset, found.nbytes) == (tensor.data_offset, tensor.n_bytes)
                raw = source.raw(tensor.name)
                assert raw.shape == (found.rows, found.row_bytes)
                assert raw.tobytes() == tensor.data.tobytes()
                assert not raw.flags.writeable
                values = source.values(tensor.name)
                assert values.dtype == np.float32
                assert values.shape == found.shape
                if found.type not in (Q.I8, Q.F64):
                    theirs_values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
                    np.testing.assert_array_equal(values, theirs_values.reshape(found.shape))
                else:
                    np.testing.assert_array_equal(values, tensor.data.astype(np.float32))


def test_metadata_and_arrays_outlive_the_source(model: Path) -> None:
    with GgufSource(model) as source:
        raw = source.raw("token_embd.weight")
        before = raw.copy()
    assert source.metadata["general.architecture"] == "qwen3"
    assert len(source.metadata["tokenizer.ggml.tokens"]) == tiny.VOCAB_SIZE
    np.testing.assert_array_equal(raw, before)
    with pytest.raises(ValueError, match="is closed"):
        source.raw("token_embd.weight")
    with pytest.raises(ValueError, match="is closed"):
        rewrite(source, model.with_name("other.gguf"))


def test_a_large_vocabulary_is_cheap(tmp_path: Path) -> None:
    count = 256_000
    tokens = array(V.STRING, count, b"".join(string(f"token {at}") for at in range(count)))
    scores = array(V.FLOAT32, count, bytes(4 * count))
    path = tmp_path / "vocabulary.gguf"
    path.write_bytes(gguf_bytes([pair("tokens", V.ARRAY, tokens), pair("scores", 9, scores)]))
    start = time.perf_counter()
    with GgufSource(path) as source:
        opened = time.perf_counter() - start
        assert len(source.metadata) == 3
        assert source.architecture == "llama"
    # About 0.06 s here; with an object for each token it would be some fifty times as much.
    assert opened < 20
    assert source.metadata["tokens"][-1] == f"token {count - 1}"
    assert len(source.metadata["scores"]) == count


def test_no_such_tensor_and_types_that_are_no_weights(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(gguf_bytes((), [entry("w", [256], Q.Q8_K)], bytes(292)))
    with GgufSource(path) as source:
        with pytest.raises(UserError, match=r"model\.gguf has no tensor named v\."):
            source.raw("v")
        with pytest.raises(UserError, match=r"w in .*model\.gguf is stored as Q8_K"):
            source.values("w")


def test_one_file_stays_open_until_it_is_another(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(model.read_bytes())
    first = file.open_gguf(path)
    assert file.open_gguf(path) is first
    with GgufSource(path) as source:
        rewrite(source, tmp_path / "new.gguf", metadata={"general.name": "new"})
    os.replace(tmp_path / "new.gguf", path)
    assert file.metadata(path)["general.name"] == "new"
    assert file.open_gguf(path) is not first


# --------------------------------------------------------------------------------------------------
# Writing the same again


def test_without_changes_every_byte_is_the_same(tmp_path: Path, model: Path) -> None:
    (tmp_path / "in").mkdir()
    for path in (*small_files(tmp_path / "in")[:2], *odd_files(tmp_path / "in"), model):
        out = tmp_path / "out" / path.name
        with GgufSource(path) as source:
            assert rewrite(source, out) == [out]
            # The whole file in one copy.
            assert len(gguf_rewrite._plan(source.layouts[0], {}, {})) == 1
        assert out.read_bytes() == path.read_bytes()


@pytest.mark.parametrize("first_empty", [False, True])
def test_splits_without_changes(tmp_path: Path, model: Path, first_empty: bool) -> None:
    parts = split(model, tmp_path / "model.gguf", 10, first_empty=first_empty)
    assert len(parts) > 3
    # Any part stands for all.
    for path in (parts[0], parts[-1]):
        with GgufSource(path) as source:
            assert source.parts == parts
            assert list(source.tensors) == list(file.tensor_types(model))
            assert source.metadata["general.name"] == file.metadata(model)["general.name"]
    with GgufSource(parts[1]) as source:
        written = rewrite(source, tmp_path / "copy.gguf")
    assert written == part_paths(tmp_path / "copy.gguf", len(parts))
    assert written[0].name == f"copy-00001-of-{len(parts):05d}.gguf"
    for old, new in zip(parts, written, strict=True):
        assert old.read_bytes() == new.read_bytes()
    assert not (tmp_path / "copy.gguf").exists()


@pytest.mark.parametrize("missing", ["copy_file_range", "both", "absent", "short"])
def test_every_way_to_copy_writes_the_same(
    tmp_path: Path, model: Path, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    def few(way: Callable[..., int]) -> Callable[..., int]:
        return lambda one, other, *rest: (
            way(one, other, rest[0], min(rest[1], 999))
            if way is sendfile
            else way(one, other, min(rest[0], 999), *rest[1:])
        )

    sendfile = os.sendfile
    if missing == "absent":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
        monkeypatch.delattr(os, "sendfile", raising=False)
    elif missing == "short" and hasattr(os, "copy_file_range"):
        monkeypatch.setattr(os, "copy_file_range", few(os.copy_file_range))
    else:
        monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
        monkeypatch.setattr(os, "sendfile", refuse if missing == "both" else few(sendfile))
    monkeypatch.setattr(pieces, "_COPY", 5000)
    monkeypatch.setattr(pieces, "_BUFFER", 777)
    path = small_files(tmp_path)[0] if missing == "short" else model
    with GgufSource(path) as source:
        rewrite(source, tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == path.read_bytes()


# --------------------------------------------------------------------------------------------------
# Changed metadata


def pairs_of(source: GgufSource) -> dict[str, bytes]:
    layout = source.layouts[0]
    return {key: layout.header[one.start : one.end] for key, one in layout.fields.items()}


def test_metadata_change_where_they_are(tmp_path: Path) -> None:
    path, out = small_files(tmp_path)[0], tmp_path / "out.gguf"
    with GgufSource(path) as source:
        rewrite(
            source,
            out,
            metadata={
                "test.INT16": -3,
                "test.UINT64": 2**40,
                "test.UINT8": 300,
                "test.f64": 5,
                "general.name": "another, much longer name than before: 你好",
                "tokenizer.ggml.tokens": ["a", "b"],
                "test.bool": None,
                "test.not there": None,
                "abl_mlx.strength": 0.5,
                "general.tags": ["abliterated", "ünïcode"],
                "abl_mlx.layers": 3,
                "abl_mlx.pinned": False,
            },
        )
        before = pairs_of(source)
        raw = {name: source.raw(name).tobytes() for name in source.tensors}
    with GgufSource(out) as changed:
        after = pairs_of(changed)
        kept = [key for key in before if key != "test.bool"]
        added = ["abl_mlx.strength", "general.tags", "abl_mlx.layers", "abl_mlx.pinned"]
        assert list(after) == kept + added
        same = {key for key in kept if after[key] == before[key]}
        assert set(kept) - same == {
            *("test.INT16", "test.UINT64", "test.UINT8", "test.f64", "general.name"),
            "tokenizer.ggml.tokens",
        }
        assert {name: changed.raw(name).tobytes() for name in changed.tensors} == raw
        assert list(changed.tensors) == list(raw)
    fields = gguf.GGUFReader(out).fields
    kinds = {key: (fields[key].types[0], fields[key].contents()) for key in after}
    assert kinds["test.INT16"] == (V.INT16, -3)
    assert kinds["test.UINT64"] == (V.UINT64, 2**40)
    assert kinds["test.UINT8"] == (V.UINT32, 300)
    assert kinds["test.f64"] == (V.FLOAT64, 5.0)
    assert kinds["tokenizer.ggml.tokens"] == (V.ARRAY, ["a", "b"])
    assert kinds["abl_mlx.strength"] == (V.FLOAT32, 0.5)
    assert kinds["general.tags"] == (V.ARRAY, ["abliterated", "ünïcode"])
    assert kinds["abl_mlx.layers"] == (V.UINT32, 3)
    assert kinds["abl_mlx.pinned"] == (V.BOOL, False)


def test_a_value_of_the_same_length_moves_nothing(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "out.gguf"
    with GgufSource(model) as source:
        context = source.metadata["qwen3.context_length"]
        rewrite(source, out, metadata={"qwen3.context_length": context + 1})
        place = source.layouts[0].fields["qwen3.context_length"]
    before, after = model.read_bytes(), out.read_bytes()
    assert after[: place.value] == before[: place.value]
    assert after[place.end :] == before[place.end :]
    assert file.metadata(out)["qwen3.context_length"] == context + 1


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"general.alignment": 64}, "general.alignment is fixed by the file"),
        ({"split.count": 1}, "split.count is fixed"),
        ({"general.architecture": None}, "general.architecture is fixed"),
        ({"k": [1, "a"]}, "metadata k mixes types"),
        ({"k": {}}, "metadata k is a dict"),
        ({"k": 2**64}, "metadata k cannot be written"),
        ({"k": 1e300}, "metadata k cannot be written"),
        ({"k": "\ud800"}, "metadata k cannot be written"),
        ({"": 1}, "must be of 1 to 65535 bytes"),
    ],
)
def test_metadata_that_cannot_be(
    tmp_path: Path, model: Path, metadata: dict[str, Any], words: str
) -> None:
    with GgufSource(model) as source, pytest.raises(UserError, match=words):
        rewrite(source, tmp_path / "out.gguf", metadata=metadata)
    assert not list(tmp_path.iterdir())


# --------------------------------------------------------------------------------------------------
# Parts that do not belong together


def two_parts(folder: Path, **first: Any) -> list[Path]:
    """Two parts with one tensor each; options are what the second says about itself."""
    paths = part_paths(folder / "model.gguf", 2)
    for index, path in enumerate(paths):
        said = {"no": index, "count": 2, "total": 2, "name": f"w{index}"}
        said.update(first if index else {})
        keys = [
            pair("split.no", V.UINT16, struct.pack("<H", said["no"])),
            pair("split.count", V.UINT16, struct.pack("<H", said["count"])),
            pair("split.tensors.count", V.INT32, struct.pack("<i", said["total"])),
        ]
        path.write_bytes(gguf_bytes(keys, [entry(said["name"], [8])], bytes(32)))
    return paths


@pytest.mark.parametrize(
    ("second", "words"),
    [
        ({"no": 0}, r"-00002-of-00002\.gguf calls itself part 1 of 2"),
        ({"count": 3}, r"-00002-of-00002\.gguf calls itself part 2 of 3"),
        ({"name": "w0"}, "the tensor w0 is both in .*-00001-of-.*and in .*-00002-of-"),
    ],
)
def test_parts_that_do_not_belong_together(
    tmp_path: Path, second: dict[str, Any], words: str
) -> None:
    paths = two_parts(tmp_path, **second)
    with pytest.raises(UserError, match=words):
        GgufSource(paths[0])


def test_missing_and_renamed_parts(tmp_path: Path) -> None:
    paths = two_parts(tmp_path)
    with GgufSource(paths[1]) as source:
        assert source.parts == paths
    with pytest.raises(UserError, match=r"is one of 2 parts, which its name does not say"):
        GgufSource(paths[0].rename(tmp_path / "model.gguf"))
    with pytest.raises(UserError, match=r"-00001-of-00002\.gguf is missing, one of 2 parts"):
        GgufSource(paths[1])
    (tmp_path / "model.gguf").rename(paths[0])
    paths[1].unlink()
    with pytest.raises(UserError, match=r"-00002-of-00002\.gguf is missing.*one folder"):
        GgufSource(paths[0])
    lonely = tmp_path / "lonely-00001-of-00001.gguf"
    lonely.write_bytes(gguf_bytes((), [entry("w", [8])], bytes(32)))
    with GgufSource(lonely) as source:
        assert rewrite(source, tmp_path / "out") == [tmp_path / "out"]


def test_parts_with_a_tensor_too_few(tmp_path: Path) -> None:
    paths = two_parts(tmp_path)
    content = paths[0].read_bytes()
    count = struct.pack("<i", 2)
    at = content.index(b"split.tensors.count") + len("split.tensors.count") + 4
    assert content[at : at + 4] == count
    paths[0].write_bytes(content[:at] + struct.pack("<i", 5) + content[at + 4 :])
    with pytest.raises(UserError, match="other parts hold 2 tensors instead of 5"):
        GgufSource(paths[0])


def test_part_names() -> None:
    for given_name in ("a.gguf", "a", "a-00007-of-00009.gguf"):
        assert [path.name for path in part_paths(Path("x") / given_name, 2)] == [
            "a-00001-of-00002.gguf",
            "a-00002-of-00002.gguf",
        ]
    assert part_paths(Path("x/any.name"), 1) == [Path("x/any.name")]


# --------------------------------------------------------------------------------------------------
# Against gguf-py, on anything it writes
