"""Multi-token prediction in GGUFs: left as it is, or edited with ``--mtp``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.choices import ApplyOptions
from abl_mlx.commands import measure_apply
from abl_mlx.records.edits import ConvertRecord
from abl_mlx.reports import tables
from convert.architectures import gguf_mtp
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from tests.commands.test_undo import abl_mlx, check_back
from tests.support.gguf_recipes.deepseek import deepseek2
from tests.support.gguf_recipes.qwen import RECIPES
from tests.support.tiny_gguf import VOCAB, Recipe, write

#: Recipe -> what writes in its drafting block, and in which block that is.
WRITERS = {
    "deepseek2": (2, {"nextn.eh_proj", "attn_output", "ffn_down_exps", "ffn_down_shexp"}),
    "qwen3next": (4, {"nextn.eh_proj", "attn_output", "ffn_down_exps", "ffn_down_shexp"}),
    "qwen35": (4, {"nextn.eh_proj", "attn_output", "ffn_down", "nextn.embed_tokens"}),
}


def recipe(name: str) -> Recipe:
    if name == "deepseek2":
        return deepseek2(drafting=True)
    found = RECIPES[f"{name}, and drafting"]
    if name == "qwen35":
        width = found.tensors["token_embd.weight"][1]
        more = {"blk.4.nextn.embed_tokens.weight": (VOCAB, width),
                "blk.4.nextn.shared_head_head.weight": (VOCAB, width)}  # fmt: skip
        found = replace(found, tensors=found.tensors | more)
    return found


@pytest.fixture
def direction(tmp_path: Path) -> Path:
    path = tmp_path / "r.npy"
    np.save(path, np.random.default_rng(3).standard_normal(256).astype(np.float32))
    return path


def changed(before: Path, after: Path) -> set[str]:
    with GgufSource(before) as old, GgufSource(after) as new:
        assert list(old.tensors) == list(new.tensors)
        return {name for name in old.tensors
                if bytes(old.raw(name).tobytes()) != bytes(new.raw(name).tobytes())}  # fmt: skip


def along(path: Path, name: str, direction: Path) -> float:
    """|r·W| / |W| of a tensor."""
    r = np.load(direction).astype(np.float64)
    r /= np.linalg.norm(r)
    with GgufSource(path) as gguf:
        w = gguf.values(name).astype(np.float64)
    found = w @ r if "embed" in name else np.swapaxes(w, -1, -2) @ r
    return float(np.linalg.norm(found) / np.linalg.norm(w))


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q4_K"])
@pytest.mark.parametrize("name", WRITERS)
def test_drafting_blocks_are_edited_on_request_alone(name, kind, direction, tmp_path):
    source = write(tmp_path / "source.gguf", recipe(name), GGMLQuantizationType[kind])
    alone, asked = tmp_path / "alone.gguf", tmp_path / "asked.gguf"
    without = measure_apply.apply(direction, str(source), [alone], ApplyOptions())
    record = measure_apply.apply(direction, str(source), [asked], ApplyOptions.of(mtp=True))
    block, roles = WRITERS[name]
    wanted = {f"blk.{block}.{role}.weight" for role in roles}
    with GgufSource(source) as gguf:
        every = [one for one in gguf.tensors if one.startswith(f"blk.{block}.")]
    plain, more = changed(source, alone), changed(source, asked)
    assert not plain & set(every)
    assert more - plain == wanted
    assert plain < more
    assert without["mtp"] == {"tensors": len(every), "edited": []}
    assert set(record["mtp"]["edited"]) == wanted
    assert wanted <= set(record["written"][0]["leak"]["tensors"])
    assert record["leak"]["total"] < 1e-3
    for tensor in wanted:
        assert along(source, tensor, direction) > 0.03
        assert along(asked, tensor, direction) < 1e-3
    assert "left as they are; --mtp" in tables.apply_table(without)
    if kind == "F32":  # what llama.cpp's plain generation says is not the drafting block's to say
        replies = []
        for file in (source, alone, asked):
            with LlamaCpp(file, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
                replies.append(runtime.top_logprobs([5, 6, 7, 8], [9, 10, 11], 4))
        assert replies[1] == replies[2] != replies[0]


def test_where_there_is_no_place_for_it(direction, tmp_path):
    plain = write(tmp_path / "plain.gguf", deepseek2())
    source = write(tmp_path / "source.gguf", deepseek2(drafting=True))
    fails: list[tuple[Path, str, dict[str, Any], str]] = [
        (plain, "x.gguf", {}, "holds no block of multi-token"),
        (source, "folder", {}, "folder has no blocks of multi-token"),
        (source, "x.lora.gguf", {}, "has no blocks of multi-token"),
        (source, "x.gguf", {"tensors": "attn_output"}, "name them there"),
        (source, "x.gguf", {"layers": frozenset({0})}, "as the last layer is, 1, which"),
    ]
    for file, out, more, message in fails:
        with pytest.raises(UserError, match=message):
            measure_apply.apply(
                direction, str(file), [tmp_path / out], ApplyOptions.of(mtp=True, **more)
            )
        assert not (tmp_path / out).exists()
    odd = deepseek2(drafting=True)
    odd = replace(odd, tensors=odd.tensors | {"blk.2.nextn.odd.weight": (256, 256)})
    other = write(tmp_path / "odd.gguf", odd)
    with pytest.raises(UserError, match=r"part is not known: blk\.2\.nextn\.odd\.weight;"):
        measure_apply.apply(direction, str(other), [tmp_path / "x.gguf"], ApplyOptions.of(mtp=True))
    record = measure_apply.apply(direction, str(other), [tmp_path / "x.gguf"], ApplyOptions())
    assert record["mtp"]["edited"] == []


def test_gains_and_biases_of_drafting_blocks():
    block = {"attn_output.weight": (8, 8), "attn_output.bias": (8,), "ffn_down.weight": (8, 16),
             "post_attention_norm.weight": (8,), "post_ffw_norm.weight": (8,)}  # fmt: skip
    shapes = {f"blk.{layer}.{name}": shape for layer in (0, 1) for name, shape in block.items()}
    shapes |= {"token_embd.weight": (32, 8), "blk.1.nextn.eh_proj.weight": (8, 16),
               "blk.1.nextn.eh_proj.bias": (8,)}  # fmt: skip
    found = {one.name: one for one in gguf_mtp.find("glm4", shapes, {})}
    assert set(found) == {f"blk.1.{n}.weight" for n in ("attn_output", "ffn_down", "nextn.eh_proj")}
    assert found["blk.1.attn_output.weight"].gain == "blk.1.post_attention_norm.weight"
    assert found["blk.1.attn_output.weight"].bias == "blk.1.attn_output.bias"
    assert found["blk.1.nextn.eh_proj.weight"].bias == "blk.1.nextn.eh_proj.bias"
    assert {one.layer for one in found.values()} == {0}
    # A block by its number alone, as the file's keys count them.
    del shapes["blk.1.nextn.eh_proj.weight"], shapes["blk.1.nextn.eh_proj.bias"]
    with pytest.raises(UserError, match="holds no block"):
        gguf_mtp.find("glm4", shapes, {"glm4.block_count": 2, "glm4.nextn_predict_layers": 1})


@pytest.mark.parametrize("flags", [["--mtp"], ["--tensors", r"blk\.[12]\.attn_output|nextn"]])
def test_undo_by_the_strength(flags, direction, tmp_path):
    source = write(tmp_path / "source.gguf", deepseek2(drafting=True), GGMLQuantizationType.F32)
    edited, back = tmp_path / "edited.gguf", tmp_path / "back.gguf"
    abl_mlx("apply", direction, source, "-o", edited, "--strength", "0.5", *flags)
    touched = changed(source, edited)
    assert "blk.2.nextn.eh_proj.weight" in touched
    assert ("blk.0.attn_output.weight" in touched) == (flags == ["--mtp"])
    abl_mlx("undo", edited, "-o", back, "--direction", direction)
    check_back(source, edited, back, "float32")


@pytest.mark.parametrize("name", ["qwen35", "deepseek2"])
def test_a_folder_made_from_a_gguf_says_what_it_leaves_out(name, direction, tmp_path):
    base, out = tmp_path / "base.gguf", tmp_path / "folder"
    write(base, recipe(name), GGMLQuantizationType.F16)
    with GgufSource(base) as gguf:
        drafting = gguf_mtp.tensors(gguf.architecture, gguf.tensors, gguf.metadata)
    record = abl_mlx("convert", base, out)
    assert record["left_out"] == drafting
    assert f"left out: {len(drafting)} tensors of multi-token prediction" in record["note"]
    assert record["note"] in tables.convert_table(ConvertRecord.of(record))
    record = abl_mlx("apply", direction, base, "-o", tmp_path / "edited")
    assert f"left out: {len(drafting)} tensors" in record["written"][0]["note"]
    assert f"left out: {len(drafting)} tensors" in (tmp_path / "edited" / "README.md").read_text()
