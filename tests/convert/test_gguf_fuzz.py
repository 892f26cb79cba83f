"""Damaged GGUF files: each class by name, and some thousands of seeded mutations of small files.

The mutations run in a process of its own (``python -m tests.convert.test_gguf_fuzz SEED CASES``),
whose memory is limited and which tells what it saw as JSON.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType as V

from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf.parts import part_paths
from convert.gguf.rewrite import Replacement, rewrite
from tests.support.places import ROOT

# --------------------------------------------------------------------------------------------------
# Files made by hand


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(data)) + data


def pair(key: str | bytes, kind: int, value: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + value


def array(item: int, count: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", item, count) + data


def entry(name: str | bytes, ne: Sequence[int], kind: int = Q.F32, offset: int = 0) -> bytes:
    """A tensor's entry; ``ne`` in the file's order, the fastest dimension first."""
    return string(name) + struct.pack(f"<I{len(ne)}QIQ", len(ne), *ne, kind, offset)


ARCHITECTURE = pair("general.architecture", V.STRING, string("llama"))


def gguf_bytes(
    pairs: Sequence[bytes] = (),
    entries: Sequence[bytes] = (),
    data: bytes = b"",
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    order: str = "<",
    counts: tuple[int, int] | None = None,
    alignment: int = 32,
) -> bytes:
    """A whole file: what is given, after general.architecture, padded and with its data."""
    pairs = [ARCHITECTURE, *pairs]
    tensors, metadata = counts or (len(entries), len(pairs))
    header = magic + struct.pack(f"{order}IQQ", version, tensors, metadata)
    header += b"".join(pairs) + b"".join(entries)
    padding = -len(header) % alignment
    return header + bytes(padding) + data if entries else header


# --------------------------------------------------------------------------------------------------
# Every class of damage

_EIGHT = np.arange(8, dtype="<f4").tobytes() + bytes(32)
_ONE = [entry("w", [8])]
_WHOLE = gguf_bytes([pair("general.name", V.STRING, string("a name"))], _ONE, _EIGHT)
_NAME_AT = _WHOLE.index(b"a name")
_ALIGN = "general.alignment"


def _number(value: int) -> bytes:
    return struct.pack("<I", value)


DAMAGE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "has only 0 bytes"),
    "too short": (b"GGUF\3\0\0\0", "has only 8 bytes"),
    "wrong magic": (b"nonsense" * 9, r"begins with b'nons' instead of b'GGUF'"),
    "web page": (b"<!DOCTYPE html><html>not found</html>", r"begins with b'<!DO'"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "before GGUF": (b"tjgg" + bytes(40), "format from before GGUF"),
    "version 1": (gguf_bytes(version=1), "version 1 of GGUF.*get a newer file"),
    "version 0": (gguf_bytes(version=0), "version 0 of GGUF"),
    "version 4": (gguf_bytes(version=4), "version 4 of GGUF.*update abl-mlx"),
    "absurd version": (gguf_bytes(version=0x12345678), "version 305419896 of GGUF"),
    "big-endian": (gguf_bytes(order=">"), "is big-endian"),
    "big-endian magic": (gguf_bytes(order=">", magic=b"FUGG"), "is big-endian"),
    "truncated in a count": (_WHOLE[:22], "only 22 bytes"),
    "truncated in a key": (_WHOLE[: _NAME_AT - 16], "would end at byte"),
    "truncated in a value": (_WHOLE[: _NAME_AT + 3], "general.name claims a string of at least 6"),
    "truncated in an entry": (_WHOLE[: _NAME_AT + 12], "would end at byte"),
    "truncated in the padding": (_WHOLE[:-65], "the data of w would end at byte"),
    "truncated in the data": (_WHOLE[:-40], "the data of w would end at byte.*truncated"),
    "absurd tensor count": (
        gguf_bytes(counts=(2**63, 1)),
        r"claims 9223372036854775808 tensors, which a file of \d+ bytes cannot hold",
    ),
    "absurd pair count": (gguf_bytes(counts=(0, 2**32)), "claims 4294967296 metadata pairs"),
    "many tensors": (
        gguf_bytes([pair("k", V.STRING, string(bytes(1 << 24)))], counts=(300_000, 2)),
        "claims 300000 tensors, more than any model has",
    ),
    "one pair too many": (gguf_bytes(counts=(0, 2)), "key 2 of 2 would end at byte"),
    "absurd key length": (gguf_bytes([struct.pack("<Q", 2**60) + b"key"]), "metadata key 2 of 2"),
    "empty key": (gguf_bytes([pair("", V.UINT8, b"1")]), "claims a name of 0 bytes"),
    "key not UTF-8": (gguf_bytes([pair(b"\xff\xfe", V.UINT8, b"1")]), "key 2 of 2 is not UTF-8"),
    "key with a zero": (gguf_bytes([pair(b"a\0b", V.UINT8, b"1")]), "contains a zero byte"),
    "key twice": (gguf_bytes([ARCHITECTURE]), "key general.architecture occurs twice"),
    "unknown value type": (gguf_bytes([pair("k", 13, b"1234")]), "k is of value type 13"),
    "unknown item type": (gguf_bytes([pair("k", 9, array(99, 1, b"1"))]), "k is of value type 99"),
    "absurd string": (
        gguf_bytes([pair("k", V.STRING, struct.pack("<Q", 2**62) + b"text")]),
        "metadata k claims a string of at least 4611686018427387904 bytes where 4 are left",
    ),
    "absurd array": (
        gguf_bytes([pair("k", V.ARRAY, array(V.UINT64, 2**61, bytes(64)))]),
        "metadata k claims an array of at least 18446744073709551616 bytes where 64 are left",
    ),
    "absurd array of strings": (
        gguf_bytes([pair("k", V.ARRAY, array(V.STRING, 2**61))]),
        "metadata k claims an array",
    ),
    "absurd string in an array": (
        gguf_bytes([pair("k", V.ARRAY, array(V.STRING, 1, struct.pack("<Q", 2**63)))]),
        "metadata k would end at byte",
    ),
    "deep array": (
        gguf_bytes([pair("k", V.ARRAY, array(V.ARRAY, 1) * 40 + array(V.UINT8, 0))]),
        "k nests arrays too deep",
    ),
    "many arrays": (
        gguf_bytes([pair("k", 9, array(9, 1 << 17, array(V.UINT8, 0) * (1 << 17)))]),
        "k nests arrays too deep or too often",
    ),
    "string not UTF-8": (gguf_bytes([pair("k", 8, string(b"a\xe9b"))]), "k is not UTF-8"),
    "string cut in a character": (gguf_bytes([pair("k", 8, string(b"\xe4\xbd"))]), "not UTF-8"),
    "tokens not UTF-8": (
        gguf_bytes([pair("k", 9, array(8, 2, string(b"\xe4\xbd") + string(b"\xa0")))]),
        "metadata k is not UTF-8",
    ),
    "bool of 2": (gguf_bytes([pair("k", V.BOOL, b"\2")]), "k is a bool that is neither 0 nor 1"),
    "alignment 0": (gguf_bytes([pair(_ALIGN, V.UINT32, _number(0))]), "alignment is 0"),
    "alignment 24": (gguf_bytes([pair(_ALIGN, V.UINT32, _number(24))]), "is 24 .*power of two"),
    "absurd alignment": (gguf_bytes([pair(_ALIGN, V.UINT32, _number(1 << 31))]), "is 2147483648"),
    "alignment as text": (gguf_bytes([pair(_ALIGN, V.STRING, string("32"))]), "type STRING"),
    "tensor twice": (gguf_bytes((), _ONE * 2, _EIGHT), "the tensor w occurs twice"),
    "name of 64 bytes": (
        gguf_bytes((), [entry("x" * 64, [8])], _EIGHT),
        "tensor 1 of 1 claims a name of 64 bytes instead of 1 to 63",
    ),
    "name not UTF-8": (gguf_bytes((), [entry(b"\x80", [8])], _EIGHT), "tensor 1 of 1 is not UTF-8"),
    "name for a terminal": (
        gguf_bytes((), [entry("\x1b[2Jw\n", [8], offset=1)], _EIGHT),
        r"the tensor '\\x1b\[2Jw\\n' has the offset 1",
    ),
    "no dimension": (gguf_bytes((), [entry("w", [])], _EIGHT + bytes(8)), "w has 0 dimensions"),
    "five dimensions": (gguf_bytes((), [entry("w", [1] * 5)], _EIGHT), "w has 5 dimensions"),
    "shape overflows": (gguf_bytes((), [entry("w", [2**33, 2**33])], _EIGHT), "absurd shape"),
    "shape wraps to 0": (gguf_bytes((), [entry("w", [2**32] * 2)], _EIGHT), "absurd shape"),
    "empty but vast": (gguf_bytes((), [entry("w", [0, 2**62])], _EIGHT), "absurd shape"),
    "unknown type": (gguf_bytes((), [entry("w", [8], 31)], _EIGHT), "tensor w in GGML type 31"),
    "absurd type": (gguf_bytes((), [entry("w", [8], 2**32 - 1)], _EIGHT), "type 4294967295"),
    "part of a block": (
        gguf_bytes((), [entry("w", [48], Q.Q4_0)], _EIGHT),
        "w has rows of 48 weights, which do not fill Q4_0's blocks of 32",
    ),
    "odd offset": (gguf_bytes((), [entry("w", [8], 0, 16)], _EIGHT), "16, which is no multiple"),
    "offset past the end": (
        gguf_bytes((), [entry("w", [8], 0, 2**62)], _EIGHT),
        "the data of w would end at byte",
    ),
    "offset overflows": (
        gguf_bytes((), [entry("w", [8], 0, 2**64 - 32)], _EIGHT),
        "the data of w would end at byte",
    ),
    "overlapping": (
        gguf_bytes((), [entry("a", [16], 0, 0), entry("b", [8], 0, 32)], _EIGHT + bytes(64)),
        "the data of b overlap those of a",
    ),
    "the same place": (
        gguf_bytes((), [entry("a", [8], 0, 0), entry("b", [8], 0, 0)], _EIGHT),
        "the data of b overlap those of a",
    ),
    "split.count as text": (
        gguf_bytes([pair("split.count", V.STRING, string("two"))]),
        "its split.count is 'two' instead of a count",
    ),
    "part without a name": (
        gguf_bytes([pair("split.count", V.UINT16, b"\3\0")]),
        "is one of 3 parts, which its name does not say.*-of-00003",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_told_in_one_sentence(kind: str, tmp_path: Path) -> None:
    content, words = DAMAGE[kind]
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as caught:
        GgufSource(path)
    sentence(str(caught.value), path.name)


def sentence(message: str, name: str) -> None:
    """One sentence that names the file and a mend, fit for a terminal."""
    assert message.endswith(".")
    assert message.isprintable(), message
    assert name in message
    assert len(message) < 600
    assert ": " in message


def test_what_is_odd_but_whole_is_read(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    nested = array(V.ARRAY, 2, array(V.UINT8, 2, b"\1\2") + array(V.STRING, 1, string("é")))
    # Version 2; arrays of arrays; a gap, another order of data, no padding at the end, no data.
    entries = [
        entry("late", [2], Q.F32, 96),
        entry("early", [3, 2], Q.F16, 0),
        entry("none", [4, 0], Q.F32, 32),
    ]
    pairs = [pair("nested", V.ARRAY, nested), pair("empty", V.ARRAY, array(V.STRING, 0))]
    data = np.arange(6, dtype="<f2").tobytes() + bytes(84) + np.ones(2, "<f4").tobytes()
    path.write_bytes(gguf_bytes(pairs, entries, data, version=2))
    with GgufSource(path) as source:
        assert source.metadata["nested"] == [[1, 2], ["é"]]
        assert source.metadata["empty"] == []
        assert list(source.tensors) == ["late", "early", "none"]
        np.testing.assert_array_equal(source.values("late"), [1, 1])
        np.testing.assert_array_equal(source.values("early"), [[0, 1, 2], [3, 4, 5]])
        assert source.values("none").shape == (0, 4)
        assert source.raw("none").shape == (0, 16)


def test_long_strings_are_text_too(tmp_path: Path) -> None:
    # Lengths of 128 and more are no UTF-8 by themselves; checks go a megabyte at a time.
    path = tmp_path / "model.gguf"
    texts = ["é" * 100, "x" * 255, "", "你" * 400_000, "z" * 65_408]
    values = array(V.STRING, len(texts), b"".join(string(text) for text in texts))
    pairs = [pair("tokens", V.ARRAY, values), pair("long", V.STRING, string("y" + texts[3]))]
    path.write_bytes(gguf_bytes(pairs))
    with GgufSource(path) as source:
        assert source.metadata["tokens"] == texts
        assert source.metadata["long"] == "y" + texts[3]
    path.write_bytes(path.read_bytes()[:-1] + b"y")
    with pytest.raises(UserError, match="metadata long is not UTF-8"):
        GgufSource(path)


def test_a_file_without_architecture_is_told_when_asked(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 0))
    with GgufSource(path) as source, pytest.raises(UserError, match=r"general\.architecture"):
        _ = source.architecture


def test_no_file_and_no_permission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"missing\.gguf is no file"):
        GgufSource(tmp_path / "missing.gguf")
    with pytest.raises(UserError, match="is no file"):
        GgufSource(tmp_path)
    path = tmp_path / "model.gguf"
    path.write_bytes(_WHOLE)

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(UserError, match=r"model\.gguf cannot be read: Permission denied"):
        GgufSource(path)


VAST: dict[str, tuple[bytes, str]] = {
    "strings": (array(V.STRING, 1 << 28), "claims 268435456 strings, more than any vocabulary"),
    "empty strings": (array(V.STRING, 1 << 22) + bytes(8 << 22), "tensor 1 of 9 claims a name"),
    "numbers": (array(V.FLOAT32, 1 << 28), "further than any header reaches"),
    "one string": (
        array(V.STRING, 1, struct.pack("<Q", 1 << 31)),
        "further than any header reaches",
    ),
    "arrays": (array(V.ARRAY, 1 << 28), "k nests arrays too deep or too often"),
}


@pytest.mark.parametrize("kind", VAST)
def test_a_vast_false_header_costs_little(kind: str, tmp_path: Path) -> None:
    value, words = VAST[kind]
    # The rest of four gigabytes are zeros, which a sparse file holds without having them.
    path = tmp_path / "model.gguf"
    with open(path, "wb") as stream:
        stream.write(gguf_bytes([pair("k", V.ARRAY, value)], counts=(9, 2)))
        stream.truncate(1 << 32)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(UserError, match=words):
        GgufSource(path)
    assert time.monotonic() - start < 60  # .01 s here; hours if it believed the header
    # In kilobytes on Linux.
    if sys.platform == "linux":
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


# --------------------------------------------------------------------------------------------------
# Mutations


def small_files(folder: Path) -> list[Path]:
    """Whole small files with everything the format has, the last two being parts of one."""
    numbers = np.random.default_rng(7)
    every, aligned, parts = folder / "every.gguf", folder / "aligned.gguf", folder / "parts.gguf"
    writer = gguf.GGUFWriter(every, "llama")
    for kind in (V.UINT8, V.INT8, V.UINT16, V.INT16, V.UINT32, V.INT32, V.UINT64, V.INT64):
        writer.add_key_value(f"test.{kind.name}", 7, kind)
    writer.add_float32("test.f32", 0.5)
    writer.add_float64("test.f64", 0.25)
    writer.add_bool("test.bool", True)
    writer.add_string("general.name", "Größe 你好")
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "a", "é", "你", ""])
    writer.add_array("tokenizer.ggml.scores", [0.0, 1.0, 2.0])
    writer.add_key_value("test.flags", [True, False], V.ARRAY, sub_type=V.BOOL)
    writer.add_key_value("test.nested", [[1, 2], [3]], V.ARRAY)
    writer.add_tensor("token_embd.weight", numbers.standard_normal((4, 64), np.float32))
    writer.add_tensor("norm.weight", numbers.standard_normal(10).astype(np.float16))
    for kind, shape in ((Q.Q8_0, (2, 3, 64)), (Q.Q4_K, (2, 256)), (Q.BF16, (3, 5))):
        block, size = gguf.GGML_QUANT_SIZES[kind]
        raw = numbers.integers(0, 60, (*shape[:-1], shape[-1] // block * size), dtype=np.uint8)
        writer.add_tensor(f"blk.0.{kind.name}.weight", raw, raw_dtype=kind)
    _write_out(writer)
    writer = gguf.GGUFWriter(aligned, "qwen3")
    writer.add_custom_alignment(128)
    writer.add_tensor("a", numbers.integers(0, 9, 5, dtype=np.int8))
    writer.add_tensor("b", numbers.standard_normal((2, 3, 2, 2)))
    _write_out(writer)
    writer = gguf.GGUFWriter(parts, "llama", split_max_tensors=2)
    for name in "abc":
        writer.add_tensor(name, numbers.standard_normal((3, 5), np.float32))
    _write_out(writer)
    return [every, aligned, *part_paths(parts, 2)]


def _write_out(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Mutator:
    """Changes a file's bytes, more often than not where its structure is."""

    def __init__(self, path: Path, chance: random.Random) -> None:
        self.data = path.read_bytes()
        self.chance = chance
        with GgufSource(path) as source:
            layout = next(part for part in source.layouts if part.path == path)
        self.header = len(layout.header)
        # Where counts, lengths, types, dimensions and offsets are: (place, width).
        self.places = [(4, 4), (8, 8), (16, 8)]
        for key, field in layout.fields.items():
            self.places += [(field.start, 8), (field.start + 8 + len(key.encode()), 4)]
            self.places += [(field.value, 4), (field.value + 4, 8), (field.value, 8)]
        for start, end in layout.entries.values():
            self.places += [(start, 8), (end - 8, 8), (end - 12, 4), (end - 20, 8)]
            length = int.from_bytes(self.data[start : start + 8], "little")
            self.places += [(start + 8 + length, 4), (start + 12 + length, 8)]

    def __call__(self) -> bytes:
        data = bytearray(self.data)
        ways = (self.flip, self.byte, self.number, self.number, self.number, self.cut, self.splice)
        for _ in range(self.chance.choice((1, 1, 1, 2, 3))):
            if data:
                self.chance.choice(ways)(data)
        return bytes(data)

    def at(self, data: bytearray) -> int:
        end = min(self.header, len(data)) if self.chance.random() < 0.8 else len(data)
        return self.chance.randrange(end)

    def flip(self, data: bytearray) -> None:
        data[self.at(data)] ^= 1 << self.chance.randrange(8)

    def byte(self, data: bytearray) -> None:
        data[self.at(data)] = self.chance.choice((0, 1, 0x7F, 0x80, 0xFF, 0xC3))

    def number(self, data: bytearray) -> None:
        place, width = self.chance.choice(self.places)
        if place + width > len(data):
            return
        old = int.from_bytes(data[place : place + width], "little")
        few = self.chance.randrange(1, 40)
        size = len(data)
        new = self.chance.choice(
            (
                *(0, 1, few, old + 1, old - 1, old + few, old * 2, old ^ 32, old + 32, old << 8),
                *(size, size - few, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1, 2**64 - 32),
            )
        )
        data[place : place + width] = (new % (1 << (8 * width))).to_bytes(width, "little")

    def cut(self, data: bytearray) -> None:
        del data[self.chance.randrange(len(data)) :]

    def splice(self, data: bytearray) -> None:
        start, target = self.at(data), self.at(data)
        piece = data[start : start + self.chance.choice((1, 4, 8, 12, 40))]
        # Over what is there, or between it, or out of it.
        end = target + self.chance.choice((len(piece), len(piece), 0))
        data[target:end] = piece if self.chance.random() < 0.8 else b""


def exercise(path: Path, out: Path) -> str | None:
    """Do everything with a file; return the sentence that refused it, if one did."""
    try:
        with GgufSource(path) as source:
            values = dict(source.metadata)
            assert len(values) == len(source.layouts[0].fields)
            for name, one in source.tensors.items():
                assert source.raw(name).nbytes == one.nbytes
                if one.type not in (Q.Q8_1, Q.Q8_K, Q.Q1_0):
                    assert source.values(name).shape == one.shape
            written = rewrite(source, out / "same.gguf")
            for old, new in zip(source.parts, written, strict=True):
                assert old.read_bytes() == new.read_bytes()
            new_tensors = dict(_replaced(source))
            written += rewrite(
                source,
                out / "changed.gguf",
                tensors=new_tensors,
                metadata={"general.name": "new", "test.more": [1.5], "test.bool": None},
            )
            with GgufSource(written[len(source.parts)]) as changed:
                assert changed.metadata["general.name"] == "new"
                assert list(changed.tensors) == list(source.tensors)
                for name in source.tensors:
                    if name not in new_tensors:
                        assert changed.raw(name).tobytes() == source.raw(name).tobytes()
        for one_path in written:
            one_path.unlink()
        return None
    except UserError as error:
        sentence(str(error), path.name.split("-")[0])
        return str(error)
    finally:
        left = list(out.iterdir())
        for one_path in left:
            one_path.unlink()
        assert not left, left


def _replaced(source: GgufSource) -> Iterator[tuple[str, Replacement]]:
    for name, one in list(source.tensors.items())[1::2]:
        values = np.ones(one.shape, np.float16)
        yield name, Replacement(Q.F16, one.shape, lambda values=values: iter([values]))


def fuzz(seed: int, cases: int, folder: Path) -> dict[str, Any]:
    """Exercise mutated files under a limit of memory and time; what was seen."""
    chance = random.Random(seed)
    files = small_files(folder)
    mutators = [Mutator(path, chance) for path in files]
    place, out = folder / "place", folder / "out"
    place.mkdir()
    out.mkdir()
    # The order of writes is not what is tested here.
    os.fsync = lambda descriptor: None  # type: ignore[assignment]
    for path in files:
        assert exercise(path, out) is None
    limit_memory(256 << 20)

    def too_long(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("one case took more than a minute")

    signal.signal(signal.SIGALRM, too_long)
    seen: Counter[str] = Counter()
    for case in range(cases):
        index = chance.choice((0, 0, 0, 1, 2, 3))
        path = place / files[index].name
        data = mutators[index]()
        path.write_bytes(data)
        if index >= 2:
            other = files[5 - index]
            (place / other.name).write_bytes(other.read_bytes())
        signal.setitimer(signal.ITIMER_REAL, 60)
        try:
            refused = exercise(path, out)
        except BaseException as error:
            keep = Path(tempfile.gettempdir()) / f"gguf-fuzz-{seed}-{case}-{path.name}"
            keep.write_bytes(data)
            raise AssertionError(f"case {case} of seed {seed}, kept as {keep}") from error
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        seen[_kind(refused)] += 1
    return {"seen": dict(seen)}


def _kind(message: str | None) -> str:
    """A sentence without the names and numbers of its case."""
    if message is None:
        return "accepted"
    marks = [
        words
        for words in (
            *("instead of b'GGUF'", "big-endian", "of GGUF", "less than a header", "LFS"),
            *("cannot hold", "more than any", "would end at byte", "claims a name", "claims a str"),
            *("claims an array", "not UTF-8", "zero byte", "occurs twice", "value type", "nests"),
            *("bool", "power of two", "of type", "dimensions", "GGML type", "absurd shape"),
            *(
                "do not fill",
                "no multiple",
                "overlap",
                "is both in",
                "calls itself",
                "tensors inst",
            ),
            *(
                "does not say",
                "is missing",
                "instead of a count",
                "cannot be written",
                "cannot hav",
            ),
            *("general.architecture",),
        )
        if words in message
    ]
    assert marks, message
    return marks[0]


def limit_memory(more: int) -> None:
    """Let this process have so many bytes more than it has now; where /proc tells what it has."""
    status = Path("/proc/self/statm")
    if status.exists():
        now = int(status.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + more, now + more))


def main(seed: int, cases: int) -> None:
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        print(json.dumps(fuzz(seed, cases, Path(folder))))


def test_thousands_of_mutations_only_ever_end_in_a_sentence() -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.convert.test_gguf_fuzz", "20", "4000"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    result = json.loads(ran.stdout)
    seen = result["seen"]
    assert sum(seen.values()) == 4000
    # Enough gets through, and enough kinds of damage are met, for the rest to mean something.
    assert seen["accepted"] > 400
    assert len(seen) > 20


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
