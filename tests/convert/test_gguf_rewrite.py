"""GGUFs with changed tensors: what llama.cpp reads, and nothing rather than a part."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from abl_mlx.behaviour.llamacpp import LlamaCpp
from convert.base.errors import UserError
from convert.gguf import file, pieces
from convert.gguf.file import GgufSource
from convert.gguf.metadata import Metadata
from convert.gguf.parts import part_paths
from convert.gguf.rewrite import Replacement, rewrite
from convert.mlx_to_gguf import write_gguf
from tests.convert.test_gguf_fuzz import (
    entry,
    gguf_bytes,
)
from tests.support import tiny
from tests.support.odd_ggufs import numbers, odd_files, q8_0, split
from tests.support.places import ROOT

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


def by_rows(source: GgufSource, made: list[bytes]) -> tuple[str, Replacement]:
    """A matrix of a file, and new values in a chunk for each row, which begins with "here".

    Args:
        made: the chunks are added to it, as they are made.
    """
    name = next(name for name, one in source.tensors.items() if len(one.shape) == 2)
    rows, n = source.tensors[name].shape

    def chunks() -> Iterator[bytes]:
        for _ in range(rows):
            made.append(b"here".ljust(4 * n, b"."))
            yield made[-1]

    return name, Replacement(Q.F32, (rows, n), chunks)


def test_memory_holds_one_chunk_beside_the_one_that_is_made(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bytes] = []
    held: list[int] = []
    write_all = pieces._write_all

    def counted(target: int, data: memoryview) -> int:
        # The first bytes of each chunk say so.
        if bytes(data[:4]) == b"here":
            held.append(len(made) - len(held))
        return write_all(target, data)

    monkeypatch.setattr(pieces, "_write_all", counted)
    with GgufSource(model) as source:
        name, replacement = by_rows(source, made)
        rewrite(source, tmp_path / "out.gguf", tensors={name: replacement})
    assert len(held) == replacement.shape[0] > 2
    assert max(held) <= 2
    with GgufSource(tmp_path / "out.gguf") as out:
        rows, n = replacement.shape
        assert out.raw(name).tobytes() == rows * b"here".ljust(4 * n, b".")


def test_a_chunk_that_cannot_be_written_stops_the_next(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = os.write
    asked: list[bytes] = []

    def full(target: int, data: memoryview) -> int:
        if bytes(data[:4]) == b"here":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(target, data)

    monkeypatch.setattr(os, "write", full)
    with GgufSource(model) as source:
        name, replacement = by_rows(source, asked)
        with pytest.raises(UserError, match=r"out\.gguf.*No space left"):
            rewrite(source, tmp_path / "out.gguf", tensors={name: replacement})
    assert replacement.shape[0] > 2 >= len(asked)
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
