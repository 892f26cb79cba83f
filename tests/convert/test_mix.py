"""Which tensor gets which type, against what llama.cpp's own quantizer chose.

tests/support/llama_mixes.json holds its choices. Where ABL_MLX_LIBLLAMA names a library of
llama.cpp that has `llama_model_quantize`, they are made anew, and bytes are compared as well.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Q

from convert.base.errors import UserError
from convert.gguf import ggml, mix
from convert.gguf.file import GgufSource
from convert.gguf.file_types import FILE_TYPES, FLOATS, file_type
from tests.support import llama_quantize
from tests.support.llama_quantize import CASES, Case

live = pytest.mark.skipif(
    llama_quantize.library() is None,
    reason=f"{llama_quantize.ENVIRONMENT} names no library with llama_model_quantize",
)


def ours(case: Case, name: str, *, importance: bool) -> dict[str, Q]:
    facts = mix.Facts.of(case.metadata(), case.architecture)
    tensors = {tensor: (shape, Q.F32) for tensor, shape in case.shapes().items()}
    return mix.types(name, tensors, facts, importance=importance)


def refused(name: str, types: dict[str, Q]) -> bool:
    try:
        mix.check_importance(name, types)
    except UserError:
        return True
    return False


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("title", CASES)
def test_types_are_those_that_llama_cpp_chose(title: str, importance: bool) -> None:
    expected = json.loads(llama_quantize.CHOICES.read_text())[title]
    for name in FILE_TYPES:
        wanted = expected[name]
        if importance:
            wanted = expected.get(f"{name}, imatrix", wanted)
        types = ours(CASES[title], name, importance=importance)
        if wanted is None:
            assert refused(name, types), name
            continue
        assert importance or not refused(name, types), name
        assert llama_quantize.grouped({one: types[one].name for one in types}) == wanted, name


@live
@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("title", ["qwen2, width 896", "llama, 4 experts", "gemma3"])
def test_types_and_bytes_are_those_of_llama_cpp(
    title: str, importance: bool, tmp_path: Path
) -> None:
    case = CASES[title]
    source = case.write(tmp_path / "source.gguf")
    weights = case.importance() if importance else {}
    for name in FILE_TYPES:
        types = ours(case, name, importance=importance)
        out = tmp_path / f"{name}.gguf"
        written = llama_quantize.quantize(source, out, name, weights or None)
        assert written == (importance or not refused(name, types)), name
        if not written:
            continue
        with GgufSource(source) as before, GgufSource(out) as after:
            assert {one: entry.type for one, entry in after.tensors.items()} == types, name
            for one, kind in types.items():
                if kind in FLOATS:
                    continue
                encoded = ggml.quantize(before.values(one), kind, weights.get(one))
                np.testing.assert_array_equal(
                    after.raw(one).reshape(-1), encoded.reshape(-1), f"{name} {one}"
                )


def test_importance_is_demanded_with_the_tensor_and_the_mend() -> None:
    types = ours(CASES["llama, 3 layers, 2 groups"], "IQ2_XS", importance=False)
    with pytest.raises(UserError, match=r"^blk\.0\.attn_q\.weight .* IQ2_XS, .*imatrix FILE"):
        mix.check_importance("IQ2_XS", types)


def test_a_tensor_beyond_the_blocks_is_named() -> None:
    facts = mix.Facts("llama", layers=2, experts=4)
    with pytest.raises(UserError, match=r"blk\.5\.ffn_down_exps\.weight belongs to none of the"):
        mix.types("Q4_K_M", {"blk.5.ffn_down_exps.weight": ((4, 2, 256), Q.F32)}, facts)


def test_facts_of_metadata() -> None:
    keys = {
        "general.architecture": "x",
        "x.block_count": 3,
        "x.attention.head_count": [8, 4, 8],
        "x.attention.head_count_kv": [2, 4, 0],
    }
    assert mix.Facts.of(keys) == mix.Facts("x", 3, 4)
    assert mix.Facts.of({**keys, "x.attention.head_count_kv": 0}).group == 0
    del keys["x.attention.head_count_kv"]
    assert mix.Facts.of(keys).group == 1


def test_names_of_file_types() -> None:
    assert file_type("q4_k") == "Q4_K_M"
    with pytest.raises(UserError, match="Q9_0 is not a supported GGUF file type"):
        file_type("Q9_0")
