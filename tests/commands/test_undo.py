"""`abl-mlx undo`: float models as they were before the edit, from whatever still knows it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import rates
from abl_mlx.demo import MODEL_PATH
from abl_mlx.inputs import prompts
from convert.gguf.file import GgufSource
from convert.mlx.safetensors_files import TensorFiles
from convert.mlx_to_gguf import write_gguf
from tests.support.command import abl_mlx, fails


@pytest.fixture
def direction(tmp_path: Path) -> Callable[..., Path]:
    def write(width: int = 64, seed: int = 3) -> Path:
        path = tmp_path / f"direction-{width}-{seed}.npy"
        values = np.random.default_rng(seed).standard_normal((2, width))
        np.save(path, values.astype(np.float32))
        return path

    return write


def tensors(place: Path) -> dict[str, np.ndarray]:
    """Every tensor in float64, of a folder or a GGUF."""
    if place.is_file():
        with GgufSource(place) as gguf:
            return {name: gguf.values(name).astype(np.float64) for name in gguf.tensors}
    with TensorFiles(place) as files:
        return {
            name: np.array(files.read(name).astype(mx.float32)).astype(np.float64)
            for name in files.names
        }


#: Distance of neighbouring numbers, relative to the larger of them.
ULP = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 2.0**-23}


def check_back(before: Path, edited: Path, after: Path, dtype: str) -> None:
    """Every weight is where it was, but for the rounding of the edited one and its own."""
    was, between, now = tensors(before), tensors(edited), tensors(after)
    assert list(was) == list(now)
    changed = 0
    for name, values in was.items():
        # Half a step of rounding each, and as much again where the edited weight went to its other
        # neighbour to keep the component away. A small weight shares in the errors of larger ones.
        step = ULP[dtype] * np.maximum(np.abs(values), np.abs(between[name]))
        # In float32 the products are as coarse as the weights.
        allowed = (8 if dtype == "float32" else 2) * (step + step.mean())
        assert (np.abs(now[name] - values) <= allowed).all(), name
        if (between[name] != values).any():
            changed += 1
            far = np.abs(between[name] - values).mean()
            assert np.abs(now[name] - values).mean() < far / (8 if dtype == "bfloat16" else 50)
    assert changed > 2


MODELS = [
    ("llama", "float16", {}),
    ("llama", "bfloat16", {"attention_bias": True}),
    ("qwen2", "bfloat16", {}),  # tied
    ("gemma3_text", "float32", {}),  # gains
    ("qwen3_moe", "float16", {}),  # experts, one by one in the files
]


@pytest.mark.parametrize(("arch", "dtype", "more"), MODELS)
def test_a_folder_is_what_it_was(
    arch: str,
    dtype: str,
    more: dict[str, Any],
    tiny_folder: Callable[..., Path],
    direction: Callable[..., Path],
    tmp_path: Path,
) -> None:
    source = tiny_folder(arch, dtype=dtype, **more)
    edited, back = tmp_path / "edited", tmp_path / "back"
    abl_mlx("apply", direction(), source, "-o", edited, "--keep-undo")
    record = abl_mlx("undo", edited, "-o", back)
    assert record["from"] == str(edited / "undo.safetensors")
    assert record["written"][0]["missing"] < {"float16": 5e-3, "bfloat16": 4e-2}.get(dtype, 1e-5)
    check_back(source, edited, back, dtype)
    assert "abl_mlx" not in json.loads((back / "config.json").read_text())
    assert {path.name for path in back.iterdir()} == {path.name for path in source.iterdir()}


@pytest.mark.parametrize("kind", ["F16", "BF16", "F32"])
def test_a_gguf_is_what_it_was(
    kind: str, tiny_folder: Callable[..., Path], direction: Callable[..., Path], tmp_path: Path
) -> None:
    source, edited, back = (tmp_path / f"{name}.gguf" for name in ("source", "edited", "back"))
    write_gguf(tiny_folder("qwen3_moe", dtype="float32"), source, file_type=kind)
    abl_mlx("apply", direction(), source, "-o", edited, "--keep-undo")
    abl_mlx("undo", edited, "-o", back)
    dtype = {"F16": "float16", "BF16": "bfloat16", "F32": "float32"}[kind]
    check_back(source, edited, back, dtype)
    with GgufSource(source) as before, GgufSource(back) as after:
        assert dict(after.metadata) == dict(before.metadata)


@pytest.mark.parametrize("form", ["folder", "gguf"])
def test_without_an_undo_file(
    form: str, tiny_folder: Callable[..., Path], direction: Callable[..., Path], tmp_path: Path
) -> None:
    source, ending = tiny_folder("llama", dtype="float32"), ""
    if form == "gguf":
        ending = ".gguf"
        write_gguf(source, tmp_path / "source.gguf", file_type="F32")
        source = tmp_path / "source.gguf"
    full, part, back, half = (tmp_path / f"{n}{ending}" for n in ("full", "part", "back", "half"))
    abl_mlx("apply", direction(), source, "-o", full)
    assert "has lost what the edit took out" in fails("undo", full, "-o", back)
    said = fails("undo", full, "-o", back, "--direction", direction())
    assert "strength 1" in said
    assert "--base" in said
    # The base knows it.
    record = abl_mlx("undo", full, "-o", back, "--direction", direction(), "--base", source)
    assert record["from"] == str(source)
    check_back(source, full, back, "float32")
    # Half of it is still there: enough to tell the other half.
    abl_mlx("apply", direction(), source, "-o", part, "--strength", 0.5, "--layers", "0,2")
    abl_mlx("undo", part, "-o", half, "--direction", direction())
    check_back(source, part, half, "float32")


def test_an_adapter_undoes_too(
    tiny_folder: Callable[..., Path], direction: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_folder("qwen3_moe", dtype="float32")
    edited, adapter = tmp_path / "edited", tmp_path / "undo.adapter"
    abl_mlx("apply", direction(), source, "-o", edited, "--keep-undo", "--strength", "0.8")
    abl_mlx("undo", edited, "-o", adapter)
    tokens = mx.array([[5, 9, 200, 31]])
    original, _ = mlx_lm.load(str(source))
    changed, _ = mlx_lm.load(str(edited))
    undone, _ = mlx_lm.load(str(edited), adapter_path=str(adapter))
    was, between, now = (model(tokens) for model in (original, changed, undone))
    assert mx.abs(was - between).max().item() > 0.01
    assert mx.abs(was - now).max().item() < 1e-4


def test_the_demo_refuses_again(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    edited, back, adapter = tmp_path / "edited", tmp_path / "back", tmp_path / "undo.adapter"
    record = abl_mlx(
        "run", "demo", "-o", edited, "--keep-undo", "--limit", 20, "--layer", 2,
        "--max-tokens", 32,
    )  # fmt: skip
    assert record["after"]["harmful_refusal_rate"] <= 0.05
    abl_mlx("undo", edited, "-o", back, "-o", adapter)
    check_back(MODEL_PATH, edited, back, "float16")
    again = abl_mlx("eval", back, "--limit", 20, "--max-tokens", 32)
    assert again["harmful_refusal_rate"] >= 0.95
    assert again["harmless_refusal_rate"] <= 0.05

    # A GGUF, and an adapter for it in llama.cpp.
    base, gguf, lora = tmp_path / "b.gguf", tmp_path / "e.gguf", tmp_path / "undo.lora.gguf"
    write_gguf(MODEL_PATH, base, file_type="F16")
    values = np.load(_kept_direction(edited, tmp_path))
    assert values.shape == (1, 256)
    abl_mlx("apply", tmp_path / "r.npy", base, "-o", gguf, "--keep-undo", "--no-embedding")
    abl_mlx("undo", gguf, "-o", lora, "-o", tmp_path / "back.gguf")
    check_back(base, gguf, tmp_path / "back.gguf", "float16")
    asked = prompts.load_demo().harmful.test.take(20)
    for answer, refuses in ((evaluate.InLlamaCpp(gguf), 0), (evaluate.InLlamaCpp(gguf, lora), 1)):
        share = rates(answer(asked.texts, 32), asked.prompts).refusal_rate
        assert abs(share - refuses) <= 0.05


def _kept_direction(edited: Path, folder: Path) -> Path:
    """The direction of an edit without gains, from what was kept of it."""
    kept = mx.load(str(edited / "undo.safetensors"))
    np.save(folder / "r.npy", np.array(kept["model.embed_tokens.weight.basis"]))  # type: ignore[call-overload]
    return folder / "r.npy"


def test_refusals(
    tiny_folder: Callable[..., Path], direction: Callable[..., Path], tmp_path: Path
) -> None:
    source = tiny_folder("llama", dtype="float32")
    edited, out = tmp_path / "edited", tmp_path / "out"
    assert "nothing to undo" in fails("undo", source, "-o", out, "--direction", direction())
    abl_mlx("apply", direction(), source, "-o", edited)
    assert "not the direction" in fails("undo", edited, "-o", out, "--direction", direction(seed=4))
    other = tiny_folder("llama", dtype="float32", seed=1)
    said = fails("undo", edited, "-o", out, "--direction", direction(), "--base", other)
    assert "off the edited model" in said
    assert "another format" in fails("undo", edited, "-o", tmp_path / "out.gguf")
    # The undo file of another edit.
    abl_mlx("apply", direction(seed=4), source, "-o", tmp_path / "4", "--keep-undo")
    said = fails("undo", edited, "-o", out, "--factors", tmp_path / "4" / "undo.safetensors")
    assert "along another direction" in said
    # An adapter leaves nothing to undo; what is quantized cannot be undone.
    said = fails("apply", direction(), source, "-o", tmp_path / "x.adapter", "--keep-undo")
    assert "leaving it out" in said
    said = fails("apply", direction(), source, "-o", tmp_path / "x.gguf", "--keep-undo")
    assert "another format" in said
    quantized = tmp_path / "q.gguf"
    write_gguf(source, quantized, file_type="Q8_0")
    said = fails("apply", direction(), quantized, "-o", tmp_path / "qe.gguf", "--keep-undo")
    assert "x.lora.gguf" in said or "NAME.lora.gguf" in said
    abl_mlx("apply", direction(), quantized, "-o", tmp_path / "qe.gguf", "--strength", "0.5")
    said = fails(
        "undo", tmp_path / "qe.gguf", "-o", tmp_path / "qb.gguf", "--direction", direction()
    )
    assert "is quantized" in said
    # The head of a tied model would stay edited.
    tied = tmp_path / "tied.gguf"
    write_gguf(MODEL_PATH, tied, file_type="F16")
    abl_mlx("apply", direction(256), tied, "-o", tmp_path / "te.gguf", "--keep-undo")
    said = fails("undo", tmp_path / "te.gguf", "-o", tmp_path / "x.lora.gguf")
    assert "token_embd.weight was edited" in said
    assert not out.exists()
    assert not list(tmp_path.glob("qb*"))
