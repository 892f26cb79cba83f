"""GGUF files read and written again: what does not change keeps its bytes, what does is right."""

from __future__ import annotations

import errno
import os
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType as V
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abl_mlx.behaviour.llamacpp import LlamaCpp
from convert.base.errors import UserError
from convert.gguf import file, pieces
from convert.gguf import rewrite as gguf_rewrite
from convert.gguf.file import GgufSource
from convert.gguf.metadata import Metadata
from convert.gguf.parts import part_paths
from convert.gguf.rewrite import Replacement, rewrite
from convert.mlx_to_gguf import write_gguf
from tests.convert.test_gguf_fuzz import (
    ARCHITECTURE,
    array,
    entry,
    gguf_bytes,
    pair,
    small_files,
    string,
)
from tests.support import tiny
from tests.support.places import ROOT


@pytest.fixture(scope="session")
def model(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny chat model in F16; never write to it."""
    folder = tiny_folder("qwen3", tokenizer="native", **tiny.WIDE)
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "model.gguf").path


def split(path: Path, out: Path, tensors: int, *, first_empty: bool = False) -> list[Path]:
    """Split a file as llama-gguf-split does: metadata in the first part, split.* in all."""
    reader = gguf.GGUFReader(path)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, arch, split_max_tensors=tensors, small_first_shard=first_empty)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            inner = field.types[-1] if field.types[0] == V.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub_type=inner)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    write_out(writer)
    return [out] if not writer.tensors[1:] else part_paths(out, len(writer.tensors))


def write_out(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def numbers(*values: np.ndarray) -> Callable[[], Iterator[np.ndarray]]:
    return lambda: iter(values)


def q8_0(source: GgufSource, name: str) -> Replacement:
    """The tensor in Q8_0, two rows a chunk."""
    values = source.values(name)
    rows = values.reshape(-1, values.shape[-1])

    def chunks() -> Iterator[np.ndarray]:
        for at in range(0, len(rows), 2):
            yield gguf.quants.quantize(rows[at : at + 2], Q.Q8_0)

    return Replacement(Q.Q8_0, values.shape, chunks)


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
    # About 0.06 s; gguf-py takes seconds.
    assert opened < 1
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


def odd_files(folder: Path) -> list[Path]:
    """Whole files of unusual layout."""
    values = np.arange(8, dtype="<f4").tobytes()
    names = [pair("general.name", V.STRING, string("odd"))]
    two = [entry("late", [8], Q.F32, 96), entry("early", [3], Q.F16, 0)]
    gaps = b"123456" + b"\7" * 90 + values
    contents = {
        "no tensors": gguf_bytes(names),
        "no tensors, padded": gguf_bytes(names) + bytes(-len(gguf_bytes(names)) % 32),
        "no pairs": b"GGUF" + struct.pack("<IQQ", 3, 0, 0),
        "version 2": gguf_bytes(names, [entry("w", [8])], values, version=2),
        "unpadded end": gguf_bytes(names, [entry("w", [5])], values[:20]),
        "more behind": gguf_bytes(names, [entry("w", [8])], values + b"something else"),
        "gaps, order, padding": gguf_bytes(names, two, gaps),
        "a gap before": gguf_bytes((), [entry("w", [8], Q.F32, 64)], b"\1" * 64 + values),
        "empty tensors": gguf_bytes((), [entry("e", [0]), entry("w", [8])], values),
    }
    paths = []
    for name, content in contents.items():
        paths.append(folder / f"{name}.gguf")
        paths[-1].write_bytes(content)
    return paths


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
# Changed tensors


def test_another_type_is_what_llama_cpp_reads(
    tmp_path: Path, model: Path, tiny_folder: Callable[..., Path]
) -> None:
    folder = tiny_folder("qwen3", tokenizer="native", **tiny.WIDE)
    wanted = write_gguf(folder, tmp_path / "wanted.gguf", file_type="Q8_0").path
    out = tmp_path / "out.gguf"
    with GgufSource(model) as source:
        matrices = [name for name, one in source.tensors.items() if one.type == Q.F16]
        assert len(matrices) > 10
        # One stays as it is, between others that become shorter.
        kept = matrices.pop(5)
        tensors = {name: q8_0(source, name) for name in matrices}
        rewrite(source, out, tensors=tensors, metadata={"general.file_type": 7})
        reader = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
        theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(wanted).tensors}
        assert list(reader) == list(source.tensors)
        for name, one in source.tensors.items():
            changed = reader[name]
            assert changed.tensor_type == (Q.Q8_0 if name in tensors else one.type)
            assert changed.data_offset % 32 == 0
            expected = theirs[name].data if name in tensors else source.raw(name)
            assert changed.data.tobytes() == expected.tobytes()
    assert out.stat().st_size < 0.7 * model.stat().st_size
    assert file.metadata(out)["general.file_type"] == 7

    def replies(path: Path) -> list[int]:
        with LlamaCpp(path, n_ctx=128, n_parallel=1, n_threads=1) as runtime:
            return runtime.greedy("How do I plan a garden?", 12)

    # The one that is not in Q8_0 makes no difference to a greedy reply.
    assert reader[kept].tensor_type == Q.F16
    assert replies(out) == replies(wanted)


def test_llama_cpp_reads_changed_splits(tmp_path: Path, model: Path) -> None:
    parts = split(model, tmp_path / "model.gguf", 9)
    with GgufSource(parts[0]) as source:
        name = next(name for name, one in source.tensors.items() if one.part == 1 and one.rows > 1)
        metadata: dict[str, Any] = {"general.name": "edited", "abl_mlx.strength": 1.0}
        written = rewrite(
            source,
            tmp_path / "staged-00001-of-00007.gguf",
            tensors={name: q8_0(source, name)},
            metadata=metadata,
        )
        assert written == part_paths(tmp_path / "staged.gguf", len(parts))
        for index, (old, new) in enumerate(zip(parts, written, strict=True)):
            assert (old.read_bytes() == new.read_bytes()) == (index > 1)
        with GgufSource(written[2]) as changed:
            assert changed.tensors[name].type == Q.Q8_0
            assert changed.metadata["general.name"] == "edited"
            assert [dict(Metadata(one))["split.no"] for one in changed.layouts] == [
                *range(len(parts))
            ]
            for other in source.tensors:
                if other != name:
                    assert changed.raw(other).tobytes() == source.raw(other).tobytes()
        # A part's own metadata are its split.* only.
        assert set(changed.layouts[1].fields) == set(source.layouts[1].fields)
    with LlamaCpp(written[0], n_ctx=64, n_parallel=1, n_threads=1) as runtime:
        reply = runtime.greedy("How do I plan a garden?", 4)
    with LlamaCpp(model, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
        assert runtime.greedy("How do I plan a garden?", 4) == reply


def test_gaps_and_order_stay_around_a_changed_tensor(tmp_path: Path) -> None:
    path = next(path for path in odd_files(tmp_path) if path.name.startswith("gaps"))
    out = tmp_path / "out.gguf"
    values = np.arange(40, dtype=np.float32)
    with GgufSource(path) as source:
        rewrite(
            source,
            out,
            tensors={"early": Replacement(Q.F32, (4, 10), numbers(values[:7], values[7:]))},
        )
        late, start = source.tensors["late"], source.layouts[0].data_start
    with GgufSource(out) as changed:
        assert list(changed.tensors) == ["late", "early"]
        assert changed.tensors["early"].shape == (4, 10)
        np.testing.assert_array_equal(changed.values("early").ravel(), values)
        np.testing.assert_array_equal(changed.values("late"), np.arange(8))
        # 160 bytes are five times the alignment; 64 of the 90 bytes of gap were no padding.
        assert changed.tensors["late"].offset == changed.layouts[0].data_start + 160 + 64
        data = out.read_bytes()[changed.tensors["early"].offset :]
        assert data[160 : 160 + 64] == path.read_bytes()[start + 32 : late.offset] == b"\7" * 64


def test_a_tensor_of_another_length_at_an_unpadded_end(tmp_path: Path) -> None:
    path = next(path for path in odd_files(tmp_path) if path.name.startswith("unpadded"))
    with GgufSource(path) as source:
        new = Replacement(Q.F16, (5,), lambda: iter([b"0123456789"]))
        rewrite(source, tmp_path / "out.gguf", tensors={"w": new})
    with GgufSource(tmp_path / "out.gguf") as changed:
        assert changed.raw("w").tobytes() == b"0123456789"
        assert changed.layouts[0].size % 32 == 0


def test_progress_counts_bytes(tmp_path: Path, model: Path) -> None:
    told: list[tuple[int, int]] = []
    with GgufSource(model) as source:
        name = "token_embd.weight"
        rewrite(
            source,
            tmp_path / "out.gguf",
            tensors={name: q8_0(source, name)},
            progress=lambda done, total: told.append((done, total)),
        )
    total = (tmp_path / "out.gguf").stat().st_size
    assert told[-1] == (total, total)
    assert sorted({one[0] for one in told}) == [one[0] for one in told]
    assert {one[1] for one in told} == {total}


# --------------------------------------------------------------------------------------------------
# Nothing, rather than a part


def interrupted() -> Iterator[bytes]:
    yield bytes(100)
    raise KeyboardInterrupt


FAILURES: dict[str, tuple[dict[str, Any], type[BaseException], str]] = {
    "interrupted": ({"chunks": interrupted}, KeyboardInterrupt, "^$"),
    "too short": ({"chunks": lambda: iter([bytes(100)])}, ValueError, "has 100 bytes instead of"),
    "too long": (
        {"chunks": lambda: (bytes(1 << 16) for _ in range(100))},
        ValueError,
        "at least .* bytes instead of",
    ),
    "unknown": ({"name": "blk.99.x"}, UserError, r"has no tensor named blk\.99\.x"),
    "blocks": (
        {"type": Q.Q4_K, "shape": (4, 100)},
        UserError,
        "rows of 100 weights, which do not fill Q4_K's blocks of 256: write it in another type",
    ),
    "shape": ({"shape": ()}, ValueError, "cannot have the shape"),
}


@pytest.mark.parametrize("kind", FAILURES)
@pytest.mark.parametrize("parts", [1, 3])
def test_a_failed_rewrite_leaves_nothing(
    tmp_path: Path, model: Path, kind: str, parts: int
) -> None:
    options, error, words = FAILURES[kind]
    (tmp_path / "in").mkdir()
    count = len(file.tensor_types(model))
    paths = split(model, tmp_path / "in" / "model.gguf", count if parts == 1 else count // 2)
    before = [path.read_bytes() for path in paths]
    with GgufSource(paths[0]) as source:
        last = list(source.tensors)[-1]
        new = Replacement(
            options.get("type", Q.F32),
            options.get("shape", (256, 256)),
            options.get("chunks", lambda: iter(())),
        )
        with pytest.raises(error, match=words):
            rewrite(
                source,
                tmp_path / "new" / "deep" / "out.gguf",
                tensors={options.get("name", last): new},
            )
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    assert [path.read_bytes() for path in paths] == before


@pytest.mark.parametrize("at", [1, 2, 3])
def test_parts_appear_together_or_not_at_all(
    tmp_path: Path, model: Path, at: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "in").mkdir()
    parts = split(model, tmp_path / "in" / "model.gguf", 15)
    assert len(parts) == 3
    rename, renamed = os.replace, []

    def fail(old: Path, new: Path) -> None:
        renamed.append(new)
        if len(renamed) == at:
            raise OSError(errno.EIO, "Input/output error", str(old))
        rename(old, new)

    monkeypatch.setattr(os, "replace", fail)
    with GgufSource(parts[0]) as source, pytest.raises(UserError, match="could not be written"):
        rewrite(source, tmp_path / "new" / "out.gguf")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    # Whoever opens the first part finds the others.
    assert len(renamed) == at
    monkeypatch.undo()
    with GgufSource(parts[0]) as source:
        rewrite(source, tmp_path / "new" / "out.gguf")


def test_a_full_disk_is_told(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "copy_file_range", full, raising=False)
    monkeypatch.setattr(os, "sendfile", full)
    with GgufSource(model) as source, pytest.raises(UserError, match=r"out\.gguf.*No space left"):
        rewrite(source, tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_kept(tmp_path: Path, model: Path) -> None:
    parts = split(model, tmp_path / "model.gguf", 15)
    (tmp_path / "out-00002-of-00003.gguf").write_text("mine")
    with GgufSource(parts[0]) as source:
        with pytest.raises(UserError, match=r"out-00002-of-00003\.gguf already exists"):
            rewrite(source, tmp_path / "out.gguf")
        with pytest.raises(UserError, match="already exists"):
            rewrite(source, tmp_path / "model.gguf")
    assert (tmp_path / "out-00002-of-00003.gguf").read_text() == "mine"
    assert not (tmp_path / "out-00001-of-00003.gguf").exists()


def test_a_source_that_changes_is_noticed(tmp_path: Path, model: Path) -> None:
    path = tmp_path / "in.gguf"
    path.write_bytes(model.read_bytes())

    def touch(done: int, total: int) -> None:
        os.utime(path, ns=(1, 1))

    with GgufSource(path) as source, pytest.raises(UserError, match=r"in\.gguf was changed"):
        rewrite(source, tmp_path / "out.gguf", progress=touch)
    with GgufSource(path) as source:
        os.truncate(path, path.stat().st_size - 4096)
        with pytest.raises(UserError, match="was changed while it was in use"):
            source.raw("token_embd.weight")
    assert [one.name for one in tmp_path.iterdir()] == ["in.gguf"]


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
# Memory


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """A sparse file of 160 MB, half of it replaced, in a process that may take 16 MB more."""
    path = tmp_path / "large.gguf"
    half = 40 << 20
    head = gguf_bytes((), [entry("a", [1 << 20, 40], Q.F16), entry("b", [half], 1, 2 * half)])
    with open(path, "wb") as stream:
        stream.write(head)
        stream.truncate(-(-len(head) // 32) * 32 + 4 * half)
    script = f"""
import numpy as np
from pathlib import Path
from convert.gguf.file import GgufSource
from convert.gguf.rewrite import Replacement, rewrite
from gguf import GGMLQuantizationType as Q
from tests.convert.test_gguf_fuzz import limit_memory
limit_memory(16 << 20)
folder = Path({str(tmp_path)!r})
row = np.ones(1 << 20, np.uint8)
with GgufSource(folder / "large.gguf") as source:
    new = Replacement(Q.I8, (40, 1 << 20), lambda: (row for _ in range(40)))
    rewrite(source, folder / "out.gguf", tensors={{"a": new}}, metadata={{"general.name": "x"}})
"""
    ran = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    with GgufSource(tmp_path / "out.gguf") as source:
        assert source.tensors["a"].type == Q.I8
        assert source.raw("a")[[0, -1], [0, -1]].tolist() == [1, 1]
        assert source.tensors["b"].nbytes == 2 * half


# --------------------------------------------------------------------------------------------------
# Against gguf-py, on anything it writes

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
integers = st.integers(-(2**31), 2**31 - 1)
scalars: dict[V, st.SearchStrategy[Any]] = {
    V.UINT8: st.integers(0, 255),
    V.INT8: st.integers(-128, 127),
    V.UINT16: st.integers(0, 2**16 - 1),
    V.INT16: st.integers(-(2**15), 2**15 - 1),
    V.UINT32: st.integers(0, 2**32 - 1),
    V.INT32: integers,
    V.UINT64: st.integers(0, 2**64 - 1),
    V.INT64: st.integers(-(2**63), 2**63 - 1),
    V.FLOAT32: st.floats(width=32, allow_nan=False),
    V.FLOAT64: st.floats(allow_nan=False),
    V.BOOL: st.booleans(),
    V.STRING: texts,
}


@st.composite
def any_value(draw: st.DrawFn) -> tuple[V, V | None, Any]:
    kind = draw(st.sampled_from(list(scalars)))
    if draw(st.booleans()):
        return kind, None, draw(scalars[kind])
    return V.ARRAY, kind, draw(st.lists(scalars[kind], min_size=1, max_size=5))


names = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=12)
shapes = st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple)
types = st.sampled_from([Q.F32, Q.F16, Q.BF16, Q.I8, Q.F64, Q.Q8_0, Q.Q4_K, Q.MXFP4, Q.IQ2_XS])
new_values = texts | integers | st.booleans() | st.floats(width=32, allow_nan=False)
FIXED = {*gguf_rewrite._FIXED, "GGUF.version", "GGUF.tensor_count", "GGUF.kv_count"}


def random_bytes(kind: Q, shape: tuple[int, ...], seed: int) -> tuple[tuple[int, ...], np.ndarray]:
    """A shape whose rows are as many blocks as said, and bytes for it."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (*shape[:-1], shape[-1] * size), np.uint8)
    return (*shape[:-1], shape[-1] * block), raw


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    keys=st.dictionaries(names.filter(lambda key: key not in FIXED), any_value(), max_size=6),
    tensors=st.dictionaries(names, st.tuples(types, shapes), max_size=5),
    alignment=st.sampled_from([None, 1, 8, 32, 64, 4096]),
    changes=st.dictionaries(names.filter(lambda key: key not in FIXED), new_values, max_size=3),
    seed=st.integers(0, 2**32 - 1),
)
def test_whatever_gguf_py_writes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    keys: dict[str, tuple[V, V | None, Any]],
    tensors: dict[str, tuple[Q, tuple[int, ...]]],
    alignment: int | None,
    changes: dict[str, Any],
    seed: int,
) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    path, same, out = (tmp_path / name for name in ("in.gguf", "same.gguf", "out.gguf"))
    for one in (path, same, out):
        one.unlink(missing_ok=True)
    data = {name: random_bytes(*one, seed) for name, one in tensors.items()}
    writer = gguf.GGUFWriter(path, "llama")
    if alignment:
        writer.add_custom_alignment(alignment)
    for key, (kind, inner, value) in keys.items():
        writer.add_key_value(key, value, kind, sub_type=inner)
    for name, (kind, _) in tensors.items():
        writer.add_tensor(name, data[name][1], raw_dtype=kind)
    write_out(writer)
    chance = np.random.default_rng(seed)
    # A key that exists, too.
    changes = {key: changes.get(key, 7) for key in [*changes, *list(keys)[:1]]}
    with GgufSource(path) as source:
        assert {key: source.metadata[key] for key in keys} == {
            key: value for key, (_, _, value) in keys.items()
        }
        assert {name: one.shape for name, one in source.tensors.items()} == {
            name: shape for name, (shape, _) in data.items()
        }
        assert rewrite(source, same) == [same]
        assert same.read_bytes() == path.read_bytes()
        replaced = {}
        for name in [name for name in tensors if chance.random() < 0.5]:
            kind = (Q.F16, Q.Q8_0, Q.F32)[chance.integers(3)]
            shape = data[name][0]
            shape = (*shape[:-1], -(-shape[-1] // 32) * 32)
            raw = random_bytes(kind, (*shape[:-1], shape[-1] // gguf.GGML_QUANT_SIZES[kind][0]), 1)
            replaced[name] = Replacement(kind, shape, numbers(raw[1]))
            data[name] = raw
        rewrite(source, out, tensors=replaced, metadata=changes)
    reader = gguf.GGUFReader(out)
    assert reader.alignment == (alignment or 32)
    assert [tensor.name for tensor in reader.tensors] == list(tensors)
    for tensor in reader.tensors:
        kind = replaced[tensor.name].type if tensor.name in replaced else tensors[tensor.name][0]
        assert tensor.tensor_type == kind
        assert tuple(reversed(tensor.shape.tolist())) == data[tensor.name][0]
        assert tensor.data.tobytes() == data[tensor.name][1].tobytes()
    found = {key: field.contents() for key, field in reader.fields.items() if key[:5] != "GGUF."}
    alignments = ["general.alignment"] if alignment else []
    new = [key for key in changes if key not in keys]
    assert list(found) == ["general.architecture", *alignments, *keys, *new]
    for key, (kind, inner, value) in keys.items():
        if key not in changes:
            assert found[key] == value
            assert reader.fields[key].types[0] == kind
            assert inner is None or reader.fields[key].types[-1] == inner
    for key, value in changes.items():
        assert found[key] == value


def test_the_builder_is_what_gguf_py_writes(tmp_path: Path) -> None:
    # The tests' own idea of the format is held against gguf-py's.
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_key_value("k", ["a"], V.ARRAY, sub_type=V.STRING)
    writer.add_tensor("w", np.arange(8, dtype=np.float32))
    write_out(writer)
    data = np.arange(8, dtype="<f4").tobytes()
    made = gguf_bytes(
        [pair("k", V.ARRAY, array(V.STRING, 1, string("a")))], [entry("w", [8])], data
    )
    assert path.read_bytes() == made
    assert ARCHITECTURE in made
