"""GGUFs as MLX models, held against llama.cpp on the same files."""

from __future__ import annotations

import dataclasses
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from mlx_lm.utils import load_model

from abl_mlx.inputs.sources import Source
from abl_mlx.models import from_gguf
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.writers import find_writers
from abl_mlx.outputs.gguf import GgufFile
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.gguf.rewrite import rewrite
from convert.gguf_to_mlx import layout, load, read_back, write_folder
from convert.mlx.safetensors_files import TensorFiles
from tests.support import tiny_gguf
from tests.support.agreement import disagreement, logprobs
from tests.support.gguf_recipes import RECIPES

PROMPT = [5, 77, 301, 12, 450, 88, 19, 260, 7, 333, 41]

#: How far llama.cpp, which rounds activations to 8 bits beside quantized weights, may be.
LIMITS = {"F16": 0.02, "Q8_0": 0.05, "Q4_K": 0.15}


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("file_type", LIMITS)
@pytest.mark.parametrize("name", RECIPES)
def test_mlx_answers_as_llama_cpp_does(name: str, file_type: str, tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", RECIPES[name], GGMLQuantizationType[file_type])
    with GgufSource(path) as source:
        model = load(source).model
    limit = LIMITS[file_type]
    assert disagreement(model, path, PROMPT, near=limit) < limit


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("name", RECIPES)
def test_the_written_folder_is_the_same_model(name: str, tmp_path: Path) -> None:
    """mlx-lm's own loader, which sanitizes names again, makes the same logits of the folder."""
    path = tiny_gguf.write(tmp_path / "tiny.gguf", RECIPES[name], GGMLQuantizationType.Q4_K)
    with GgufSource(path) as source:
        expected = logprobs(load(source).model, PROMPT)
        report = write_folder(source, tmp_path / "folder")
    assert report.forms.get("affine 4-bit", 0) > 0
    model, config = load_model(tmp_path / "folder")
    assert config["quantization"]["group_size"] == 32
    # Scales are rounded to float16, which moves a weight by 2^-11 of itself.
    difference = np.abs(logprobs(model, PROMPT) - expected).max()
    assert difference < 0.03


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what is in memory")
def test_a_loaded_file_is_not_in_memory_a_second_time(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", RECIPES["llama"], GGMLQuantizationType.F16)

    def resident() -> int:
        """Kilobytes of the mapped file that are in memory."""
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        found = 0
        for line in lines:
            if line.endswith(str(path)):
                found += next(int(one.split()[1]) for one in lines if one.startswith("Rss:"))
        return found

    with GgufSource(path) as source:
        for name in source.tensors:
            int(source.raw(name).sum())
        size = path.stat().st_size // 1024
        assert resident() > 0.7 * size
        loaded = load(source, widen=False)
        # Reading one page brings its neighbours, so some of the last tensors' stay.
        assert resident() < 0.3 * size
    assert loaded.model is not None


class _Ids(ChatModel):
    """A model without a tokenizer."""

    def encode(self, prompt: str) -> list[int]:
        return PROMPT


@pytest.mark.by_turns(3)
@pytest.mark.parametrize("name", RECIPES)
def test_writers_of_the_file_are_those_that_probing_finds(name: str, tmp_path: Path) -> None:
    """Facts about llama.cpp's graphs and the forward pass of mlx-lm's model agree."""
    path = tiny_gguf.write(tmp_path / "tiny.gguf", RECIPES[name])
    with GgufSource(path) as source:
        loaded = load(source)
        chat = _Ids(path, loaded.model, None, loaded.config)
        named = GgufFile(Source("model", source.parts[0])).named_writers()
        ours = {
            writer.path: writer
            for writer in from_gguf.find_writers(chat, loaded.layout, source, named)
        }
    try:
        probed = {writer.path: writer for writer in find_writers(chat)}
    except UserError as error:
        # Probing looks for more than it needs to: an architecture whose file says more than the
        # forward pass tells is proved in llama.cpp (tests/convert/test_gguf_writers.py) all the
        # same.
        if not re.search("embeddings|through more than a gain|other than its linear", str(error)):
            raise
        pytest.skip(str(error))
    assert ours.keys() == probed.keys()
    for path_of, writer in probed.items():
        mine = ours[path_of]
        assert (mine.kind, mine.layer, mine.tied) == (writer.kind, writer.layer, writer.tied)
        assert mine.has_bias == writer.has_bias
        assert (mine.gain is None) == (writer.gain is None)
        if writer.gain is not None:
            # A gain is known up to a constant factor.
            one, other = mine.gain / mx.linalg.norm(mine.gain), writer.gain
            other = other / mx.linalg.norm(other)
            assert mx.abs(one - other).max().item() < 1e-3


def test_a_written_folder_is_read_back_under_the_files_names(tmp_path: Path) -> None:
    path = tiny_gguf.write(
        tmp_path / "tiny.gguf", RECIPES["qwen35, and drafting"], GGMLQuantizationType.Q4_K
    )
    with GgufSource(path) as source, TensorFiles(_folder(source, tmp_path)) as files:
        found = layout(source)
        columns = 0
        for writer in GgufFile(Source("model", source.parts[0])).named_writers():
            values = read_back(found, tmp_path / "folder", files, writer.name, source.shapes)
            expected = source.values(writer.name)
            assert values.shape == expected.shape
            assert np.abs(np.array(values) - expected).max() < 2e-3 * np.abs(expected).max()
            weight = found.weights[found.places()[writer.name][0]]
            columns += weight.pieces[0].columns is not None
        assert columns > 0  # the reordered ones were among them


def _folder(source: GgufSource, tmp_path: Path) -> Path:
    return write_folder(source, tmp_path / "folder").path


# --- refusals ----------------------------------------------------------------------------------


def test_what_cannot_be_run_is_named(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", RECIPES["llama"])

    def refuses(words: str, **metadata: object) -> None:
        other = tmp_path / f"{len(list(tmp_path.iterdir()))}.gguf"
        with GgufSource(path) as source:
            rewrite(source, other, metadata=metadata)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=words) as caught, GgufSource(other) as source:
            load(source)
        assert str(other) in str(caught.value)

    refuses("ask for", **{"llama.attention.head_count_kv": 2})
    refuses("lacks the tensor for model.layers.3", **{"llama.block_count": 4})
    refuses("has no llama.block_count", **{"llama.block_count": None})
    refuses("must be a whole number", **{"llama.block_count": "three"})


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    recipe = RECIPES["llama"]
    path = tiny_gguf.write(tmp_path / "bert.gguf", dataclasses.replace(recipe, architecture="bert"))
    with GgufSource(path) as source, pytest.raises(UserError, match="architecture bert, which"):
        layout(source)


def test_values_that_are_not_finite_are_named(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "tiny.gguf", RECIPES["llama"])
    data = bytearray(path.read_bytes())
    with GgufSource(path) as source:
        entry = source.tensor("blk.1.ffn_up.weight")
    data[entry.offset : entry.offset + 2] = b"\x00\x7c"  # infinity in float16
    path.write_bytes(data)
    with GgufSource(path) as source:
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight are not all finite"):
            load(source)
        with pytest.raises(UserError, match=r"layers\.1\.mlp\.up_proj\.weight are not all finite"):
            write_folder(source, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
