"""A GGUF in other types, as llama-quantize writes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from convert.base.errors import UserError
from convert.gguf import ggml, imatrix, mix
from convert.gguf.file import GgufSource
from convert.gguf.file_types import FLOATS
from convert.gguf.quantize import Quantization
from convert.gguf.rewrite import rewrite
from tests.support import llama_quantize
from tests.support.llama_quantize import CASES


def written(
    source: Path, out: Path, file_type: str, weights: imatrix.Imatrix | None = None, **more: bool
) -> Path:
    with GgufSource(source) as opened:
        made = Quantization.of(opened, file_type, weights, **more)
        tensors = made.replacements(opened)
        return rewrite(opened, out, tensors=tensors, metadata=made.metadata())[0]


@pytest.fixture
def weights(tmp_path: Path) -> imatrix.Imatrix:
    case = CASES["llama, 4 experts"]
    sums = {name: one.reshape(-1, one.shape[-1]) for name, one in case.importance().items()}
    counts = {name: np.ones(len(one)) for name, one in sums.items()}
    path = tmp_path / "importance.gguf"
    imatrix.write(path, sums, counts, ["a text"], 1000)
    return imatrix.read(path)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return CASES["llama, 4 experts"].write(tmp_path / "source.gguf")


@pytest.mark.parametrize("weighted", [False, True])
def test_every_tensor_is_what_ggml_makes_of_it(
    source: Path, tmp_path: Path, weights: imatrix.Imatrix, weighted: bool
) -> None:
    used = weights if weighted else None
    for file_type in ("Q4_K_M", "Q3_K_S", "IQ4_XS", "Q4_0", "F16"):
        out = written(source, tmp_path / f"{file_type}.gguf", file_type, used)
        with GgufSource(source) as before, GgufSource(out) as after:
            facts = mix.Facts.of(before.metadata)
            tensors = {name: (one.shape, one.type) for name, one in before.tensors.items()}
            types = mix.types(file_type, tensors, facts, importance=weighted)
            for name, entry in after.tensors.items():
                assert entry.type == types[name]
                values = before.values(name)
                if entry.type in FLOATS:
                    np.testing.assert_allclose(after.values(name), values, rtol=1e-3, atol=1e-6)
                    continue
                importance = used.weights(name, entry.shape) if used else None
                wanted = ggml.quantize(values, entry.type, importance)
                np.testing.assert_array_equal(after.raw(name).ravel(), wanted.ravel(), name)
            keys = after.metadata
            assert keys["general.quantization_version"] == 2
            assert ("quantize.imatrix.dataset" in keys) == weighted
            if weighted:
                assert keys["quantize.imatrix.file"] == "importance.gguf"
                assert keys["quantize.imatrix.entries_count"] == len(weights.entries)
                assert keys["quantize.imatrix.chunks_count"] == 2


@pytest.mark.skipif(llama_quantize.library() is None, reason="no llama_model_quantize")
@pytest.mark.parametrize("weighted", [False, True])
def test_tensors_are_those_of_llama_model_quantize(
    source: Path, tmp_path: Path, weights: imatrix.Imatrix, weighted: bool
) -> None:
    ours = written(source, tmp_path / "ours.gguf", "Q4_K_M", weights if weighted else None)
    theirs = tmp_path / "theirs.gguf"
    assert llama_quantize.quantize(source, theirs, "Q4_K_M", weights.entries if weighted else None)
    with GgufSource(ours) as one, GgufSource(theirs) as other:
        assert one.tensors.keys() == other.tensors.keys()
        for name in one.tensors:
            assert one.tensors[name].type == other.tensors[name].type
            np.testing.assert_array_equal(one.raw(name), other.raw(name), name)


def test_weighting_lowers_the_weighted_error(
    source: Path, tmp_path: Path, weights: imatrix.Imatrix
) -> None:
    errors = []
    for used in (None, weights):
        out = written(source, tmp_path / f"{used is None}.gguf", "Q3_K_S", used)
        name = "blk.0.ffn_up_exps.weight"
        with GgufSource(source) as before, GgufSource(out) as after:
            importance = weights.weights(name, before.tensors[name].shape)
            assert importance is not None
            error = np.square(after.values(name) - before.values(name)) * importance[:, None]
        errors.append(float(error.sum()))
    assert errors[1] < 0.9 * errors[0]


def test_quantized_tensors_keep_their_type_on_demand(source: Path, tmp_path: Path) -> None:
    first = written(source, tmp_path / "first.gguf", "Q8_0")
    same = written(first, tmp_path / "same.gguf", "Q4_K_M", keep=True)
    with GgufSource(first) as before, GgufSource(same) as after:
        for name, entry in before.tensors.items():
            assert after.tensors[name].type == entry.type
            np.testing.assert_array_equal(after.raw(name), before.raw(name))
    again = written(first, tmp_path / "again.gguf", "Q4_K_M")
    with GgufSource(again) as after:
        assert after.tensors["blk.0.attn_q.weight"].type == Q.Q4_K


def test_types_that_need_importance_are_refused_without_it(
    source: Path, tmp_path: Path, weights: imatrix.Imatrix
) -> None:
    with pytest.raises(UserError, match="useless without an importance matrix"):
        written(source, tmp_path / "out.gguf", "IQ2_XS")
    assert not (tmp_path / "out.gguf").exists()
    out = written(source, tmp_path / "out.gguf", "IQ2_XS", weights)
    with GgufSource(out) as after:
        assert Q.IQ2_XS in {entry.type for entry in after.tensors.values()}


def test_a_weight_too_large_for_the_type_is_named(tmp_path: Path) -> None:
    case = CASES["llama, 3 layers, 2 groups"]
    path = case.write(tmp_path / "source.gguf")
    with GgufSource(path) as opened:
        entry = opened.tensors["blk.1.ffn_up.weight"]
    with path.open("r+b") as stream:
        stream.seek(entry.offset)
        stream.write(np.float32(1e6).tobytes())
    with pytest.raises(UserError, match=r"blk\.1\.ffn_up\.weight: .* does not fit F16"):
        written(path, tmp_path / "out.gguf", "F16")
    assert not (tmp_path / "out.gguf").exists()
