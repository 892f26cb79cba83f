"""Importance matrices of the passes that measure a direction, against sums taken one by one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx import demo
from abl_mlx.choices import MeasureOptions
from abl_mlx.commands import conversion, measure_apply
from abl_mlx.models import capture, chat_model, input_squares
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.hooks import around
from abl_mlx.models.input_squares import InputSquares
from abl_mlx.outputs.model_file import find_model
from convert.base.errors import UserError
from convert.gguf import imatrix
from convert.gguf.file import GgufSource
from tests.support import tiny

SEQUENCES = [[5, 6, 7, 8, 9, 10], [5, 6, 7, 9], [5, 6, 7, 8, 30, 31, 32, 33, 34], [5, 6, 7, 9, 9]]


def collected(folder: Path, sequences: list[list[int]], out: Path) -> dict[str, np.ndarray]:
    """Our importance matrix, by the passes that `measure` makes."""
    with find_model(str(folder)) as model:
        chat = chat_model.load(folder)
        squares = InputSquares(chat.model, model.matrices())
    with input_squares.recorded(chat, squares):
        capture.mean(chat, sequences)
        capture.mean(chat, sequences)  # prompts that were run before do not count twice
    assert squares.tokens == sum(map(len, sequences))
    squares.write(out, ["a", "b"])
    return dict(imatrix.read(out).entries)


def inputs(chat: ChatModel, path: str, sequences: list[list[int]]) -> list[list[Any]]:
    """The arguments of every call of a module, prompt by prompt."""
    kept: list[list[Any]] = []
    module = dict(chat.model.named_modules())[path]

    def keep(call: Any, *args: Any, **kwargs: Any) -> Any:
        kept.append([np.array(one.astype(mx.float32)) for one in args])
        return call(*args, **kwargs)

    with around([(module, keep)]):
        for sequence in sequences:
            mx.eval(chat.model(mx.array([sequence])))
    return kept


@pytest.mark.parametrize("arch", ["llama", "qwen2", "gemma3_text", "phi3"])
def test_sums_are_those_of_single_prompts(arch: str, tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", arch, dtype="float32")
    found = collected(folder, SEQUENCES, tmp_path / "x.gguf")
    chat = chat_model.load(folder)
    fused = "model.layers.1.self_attn.qkv_proj" if arch == "phi3" else None
    for tensor, path in {
        f"blk.1.attn_{'qkv' if fused else 'q'}.weight": fused or "model.layers.1.self_attn.q_proj",
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj",
        "blk.0.attn_output.weight": "model.layers.0.self_attn.o_proj",
    }.items():
        rows = np.concatenate([call[0][0] for call in inputs(chat, path, SEQUENCES)])
        assert len(rows) == sum(map(len, SEQUENCES))
        wanted = np.square(rows, dtype=np.float64).mean(axis=0)
        np.testing.assert_allclose(found[tensor][0], wanted, rtol=1e-4)
    assert not any(name.startswith(("token_embd", "output")) or "norm" in name for name in found)


@pytest.mark.parametrize("repeat", [1, 8])
def test_experts_have_the_sums_of_the_tokens_sent_to_them(repeat: int, tmp_path: Path) -> None:
    """With few tokens mlx-lm keeps their order, with many it sorts them by expert."""
    folder = tiny.write_model(tmp_path / "model", "qwen3_moe", dtype="float32")
    sequences = [one * repeat for one in SEQUENCES]
    found = collected(folder, sequences, tmp_path / "x.gguf")
    chat = chat_model.load(folder)
    calls = inputs(chat, "model.layers.1.mlp.switch_mlp", sequences)
    experts = found["blk.1.ffn_gate_exps.weight"]
    for expert, mean in enumerate(experts):
        rows = [
            token
            for x, chosen in calls
            for token, which in zip(x[0], chosen[0], strict=True)
            if expert in which
        ]
        wanted = np.square(rows).mean(axis=0) if rows else np.ones(mean.shape)
        np.testing.assert_allclose(mean, wanted, rtol=1e-4)
    assert found["blk.1.ffn_down_exps.weight"].shape[0] == len(experts)
    np.testing.assert_array_equal(found["blk.1.ffn_up_exps.weight"], experts)


def test_measure_writes_one_that_convert_takes(tmp_path: Path) -> None:
    """From the folder and from its GGUF, which have the same inputs."""
    gguf = tmp_path / "demo.gguf"
    conversion.convert("demo", gguf, quantize="F32")
    made = []
    for source in ("demo", str(gguf)):
        path = tmp_path / f"{len(made)}.gguf"
        record = measure_apply.measure(
            source, path.with_suffix(".safetensors"), MeasureOptions(), importance=path
        )
        assert record.outputs == [str(path.with_suffix(".safetensors")), str(path)]
        made.append(imatrix.read(path))
    assert made[0].datasets == ("demo:harmful/train", "demo:harmless/train")
    with GgufSource(gguf) as opened:
        made[0].check(opened.shapes)
        matrices = [name for name in opened.tensors if name.startswith("blk.")]
        assert set(made[0].entries) == {name for name in matrices if "norm" not in name}
    for name, values in made[0].entries.items():
        np.testing.assert_allclose(values, made[1].entries[name], rtol=1e-3)
    out = tmp_path / "out.gguf"
    conversion.convert("demo", out, quantize="Q4_K_M", imatrix=made[0].path)
    assert out.exists()


def test_the_direction_is_the_same(tmp_path: Path) -> None:
    files = []
    for importance in (None, tmp_path / "x.gguf"):
        files.append(tmp_path / f"{len(files)}.safetensors")
        measure_apply.measure("demo", files[-1], MeasureOptions(), importance=importance)
    one, other = (mx.load(str(file)) for file in files)
    assert one.keys() == other.keys()
    for name in one:
        np.testing.assert_allclose(np.array(one[name]), np.array(other[name]), atol=1e-3)


def test_mistakes_come_before_any_work(tmp_path: Path) -> None:
    out = tmp_path / "d.safetensors"
    with pytest.raises(UserError, match=r"x\.dat: the name of an importance matrix ends in"):
        measure_apply.measure("demo", out, MeasureOptions(), importance=tmp_path / "x.dat")
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(UserError, match="exists"):
        measure_apply.measure("demo", out, MeasureOptions(), importance=tmp_path / "x.gguf")
    assert not out.exists()
    assert demo.MODEL_PATH.exists()
