"""GGUFs joined, split and split anew, checked by gguf-py and llama.cpp."""

from __future__ import annotations

import itertools
from pathlib import Path

import gguf
import numpy as np
import pytest

from convert.base.errors import UserError
from convert.gguf.file import GgufSource, metadata
from convert.gguf.quantize import Quantization
from convert.gguf.rewrite import NewParts, rewrite, split
from tests.support.llama_quantize import CASES


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return CASES["llama, 32 layers, grouped"].write(tmp_path / "model.gguf")


def regrouped(source: Path, out: Path, largest: int | None, **more: object) -> list[Path]:
    with GgufSource(source) as opened:
        return rewrite(opened, out, parts=NewParts(largest), **more)  # type: ignore[arg-type]


def same(one: Path, other: Path) -> None:
    with GgufSource(one) as first, GgufSource(other) as second:
        assert list(first.tensors) == list(second.tensors)
        for name, entry in first.tensors.items():
            assert second.tensors[name].type == entry.type
            np.testing.assert_array_equal(first.raw(name), second.raw(name))
        keys = [key for key in first.metadata if not key.startswith("split.")]
        assert keys == [key for key in second.metadata if not key.startswith("split.")]
        assert all(first.metadata[key] == second.metadata[key] for key in keys)


@pytest.mark.parametrize("largest", [40_000, 100_000, 250_000])
def test_no_part_is_larger_than_it_may_be(model: Path, tmp_path: Path, largest: int) -> None:
    parts = regrouped(model, tmp_path / "parts.gguf", largest)
    assert len(parts) >= model.stat().st_size // largest
    assert all(part.stat().st_size <= largest for part in parts)
    # Nor are they smaller than they need be: two in a row would not fit into one.
    sizes = [part.stat().st_size for part in parts]
    assert all(one + other > largest for one, other in itertools.pairwise(sizes))
    same(model, parts[0])


def test_parts_are_as_llama_cpp_writes_them(model: Path, tmp_path: Path) -> None:
    parts = regrouped(model, tmp_path / "parts.gguf", 100_000)
    assert [part.name for part in parts] == [
        f"parts-{number:05d}-of-{len(parts):05d}.gguf" for number in range(1, len(parts) + 1)
    ]
    total = 0
    for number, part in enumerate(parts):
        reader = gguf.GGUFReader(part)
        fields = {key: field for key, field in reader.fields.items() if key[:5] != "GGUF."}
        assert fields["split.no"].contents() == number
        assert fields["split.count"].contents() == len(parts)
        assert fields["split.tensors.count"].contents() == len(GgufSource(model).tensors)
        kinds = [fields[key].types[0].name for key in ("split.no", "split.count")]
        assert kinds == ["UINT16", "UINT16"]
        assert fields["split.tensors.count"].types[0].name == "INT32"
        assert ("general.architecture" in fields) == (number == 0)
        assert len(fields) == 3 or number == 0
        total += len(reader.tensors)
    assert total == len(GgufSource(model).tensors)


def test_there_and_back_is_the_same_file(model: Path, tmp_path: Path) -> None:
    parts = regrouped(model, tmp_path / "parts.gguf", 60_000)
    again = regrouped(parts[0], tmp_path / "again.gguf", 150_000)
    assert 1 < len(again) < len(parts)
    same(parts[0], again[0])
    [joined] = regrouped(again[-1], tmp_path / "joined.gguf", None)
    assert joined.read_bytes() == model.read_bytes()
    assert not any(key.startswith("split.") for key in metadata(joined))


def test_a_small_file_stays_in_one_part(model: Path, tmp_path: Path) -> None:
    [whole] = regrouped(model, tmp_path / "whole.gguf", 1 << 30)
    assert whole.read_bytes() == model.read_bytes()
    assert split(whole, NewParts(1 << 30)) == [whole]
    assert split(whole, None) == split(whole, NewParts()) == [whole]


def test_a_tensor_larger_than_a_part_has_its_own(model: Path, tmp_path: Path) -> None:
    parts = regrouped(model, tmp_path / "parts.gguf", 1)
    assert len(parts) == len(GgufSource(model).tensors)
    same(model, parts[0])


def test_new_types_and_metadata_go_into_new_parts(model: Path, tmp_path: Path) -> None:
    with GgufSource(model) as source:
        made = Quantization.of(source, "Q8_0")
        keys = {**made.metadata(), "general.name": "x"}
        options = {"tensors": made.replacements(source), "metadata": keys}
        [whole] = rewrite(source, tmp_path / "whole.gguf", **options)
        parts = rewrite(source, tmp_path / "parts.gguf", **options, parts=NewParts(60_000))
    assert len(parts) > 1
    same(whole, parts[0])
    assert metadata(parts[0])["general.file_type"] == 7


def test_another_alignment_is_kept_in_every_part(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_custom_alignment(64)
    for number in range(6):
        writer.add_tensor(f"blk.{number}.x", np.full((3, 5), number, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    parts = regrouped(tmp_path / "model.gguf", tmp_path / "parts.gguf", 500)
    assert len(parts) > 1
    for part in parts:
        assert gguf.GGUFReader(part).alignment == 64
    same(tmp_path / "model.gguf", parts[0])


def test_a_file_is_replaced_by_its_parts(model: Path) -> None:
    with GgufSource(model) as source:
        values = {name: source.values(name) for name in source.tensors}
    parts = split(model, NewParts(100_000))
    assert not model.exists()
    assert len(parts) > 1
    with GgufSource(parts[0]) as source:
        for name, value in values.items():
            np.testing.assert_array_equal(source.values(name), value)


def test_parts_that_exist_are_not_replaced(model: Path, tmp_path: Path) -> None:
    parts = regrouped(model, tmp_path / "parts.gguf", 100_000)
    before = [part.read_bytes() for part in parts]
    parts[0].unlink()
    with pytest.raises(UserError, match="exists"):
        regrouped(model, tmp_path / "parts.gguf", 100_000)
    assert not parts[0].exists()
    assert [part.read_bytes() for part in parts[1:]] == before[1:]
