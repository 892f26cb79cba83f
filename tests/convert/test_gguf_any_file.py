"""Whatever gguf-py writes is read and rewritten as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q
from gguf import GGUFValueType as V
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from convert.gguf import rewrite as gguf_rewrite
from convert.gguf.file import GgufSource
from convert.gguf.rewrite import Replacement, rewrite
from tests.convert.test_gguf_fuzz import (
    ARCHITECTURE,
    array,
    entry,
    gguf_bytes,
    pair,
    string,
)
from tests.support.odd_ggufs import numbers, write_out

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
