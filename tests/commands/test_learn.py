"""`abl-mlx learn`: an edit is recovered from a base model and what was made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.choices import ApplyOptions
from abl_mlx.cli.main import cli
from abl_mlx.commands import conversion, learn, measure_apply
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import find_writers
from tests.support import tiny

D = 256
ENDS = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")

Change = Callable[[np.ndarray, str], np.ndarray]


def subspace(*shape: int, seed: int = 3) -> np.ndarray:
    """Orthonormal directions (k, d), or (L, k, d)."""
    random = np.random.default_rng(seed).standard_normal(shape)
    turned = np.linalg.qr(random.swapaxes(-1, -2))[0].swapaxes(-1, -2)
    return turned.astype(np.float32)


def script(source: Path, out: Path, change: Change) -> Path:
    """A folder that a plain script made of another: writers as (d, n), changed in float64."""
    shutil.copytree(source, out)
    file = out / "model.safetensors"
    tensors = dict(mx.load(str(file)))
    for name, value in tensors.items():
        if name.endswith(ENDS):
            w = np.array(value.astype(mx.float32)).astype(np.float64)
            turned = name.endswith("embed_tokens.weight")
            w = change(w.T if turned else w, name)
            tensors[name] = mx.array((w.T if turned else w).astype(np.float32)).astype(value.dtype)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})
    return out


def removed(w: np.ndarray, u: np.ndarray, strength: float = 1.0) -> np.ndarray:
    return w - strength * u.T @ (u @ w)


def by_layer(name: str) -> int:
    parts = name.split(".")
    return int(parts[parts.index("layers") + 1]) if "layers" in parts else -1


def columns_kept(w: np.ndarray, name: str) -> np.ndarray:
    edited = removed(w, subspace(1, D), 0.7)
    return edited * np.linalg.norm(w, axis=0) / np.linalg.norm(edited, axis=0)


def rows_kept(w: np.ndarray, name: str) -> np.ndarray:
    edited = removed(w, subspace(1, D))
    ratio = np.linalg.norm(w, axis=1, keepdims=True) / np.linalg.norm(edited, axis=1, keepdims=True)
    return edited * ratio


def own_of_layers(w: np.ndarray, name: str) -> np.ndarray:
    return removed(w, subspace(4, 1, D)[max(0, by_layer(name))])


def weaker_below(w: np.ndarray, name: str) -> np.ndarray:
    """Attention alone, and its layers at strengths of their own."""
    if "o_proj" not in name:
        return w
    return removed(w, subspace(1, D), (0.0, 0.4, 1.0, 1.2)[by_layer(name)])


def cosines(found: np.ndarray, true: np.ndarray) -> float:
    """The least |cos| of the directions of any layer."""
    found, true = (np.broadcast_to(one, (4, *one.shape[-2:])) for one in (found, true))
    each = zip(found, true, strict=True)
    return min(np.linalg.svd(a @ b.T, compute_uv=False).min() for a, b in each)


EDITS: dict[str, tuple[Change, np.ndarray, dict[str, Any]]] = {
    "full": (
        lambda w, name: removed(w, subspace(1, D)),
        subspace(1, D),
        {"strength": 1.0, "norm": "none", "layers": [0, 1, 2, 3], "recipe": {"embedding": True}},
    ),
    "0.3, three directions": (
        lambda w, name: removed(w, subspace(3, D), 0.3),
        subspace(3, D),
        {"strength": pytest.approx(0.3, abs=0.01), "rank": 3, "norm": "none"},
    ),
    "1.3, two layers": (
        lambda w, name: removed(w, subspace(1, D), 1.3) if by_layer(name) in (1, 2) else w,
        subspace(1, D),
        {"strength": pytest.approx(1.3, abs=0.01), "norm": "none", "layers": [1, 2]},
    ),
    "strengthened": (
        lambda w, name: removed(w, subspace(1, D), -0.5),
        subspace(1, D),
        {"strength": pytest.approx(-0.5, abs=0.01), "norm": "none"},
    ),
    "columns kept": (
        columns_kept, subspace(1, D), {"strength": pytest.approx(0.7, abs=0.01), "norm": "columns"},
    ),
    "rows kept": (rows_kept, subspace(1, D), {"strength": 1.0, "norm": "rows"}),
    "directions of layers": (own_of_layers, subspace(4, 1, D), {"per_layer": True, "rank": 1}),
    "strengths of layers": (weaker_below, subspace(1, D), {"norm": "none", "layers": [1, 2, 3]}),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_what_a_script_did_is_learned(tmp_path: Path, name: str) -> None:
    change, directions, wanted = EDITS[name]
    edited = script(MODEL_PATH, tmp_path / "edited", change)
    out = tmp_path / "edit.safetensors"
    record = learn.learn("demo", str(edited), out)
    assert record["verdict"] == "edited"
    assert {key: record[key] for key in wanted} == wanted
    assert cosines(np.array(direction_file.read(out).selected), directions) > 0.995
    if name == "strengths of layers":
        profile = record["recipe"]["profile"]
        found = record["strength"] * np.array([profile["attention"], profile["mlp"]])
        assert found == pytest.approx(np.array([[0, 0.4, 1, 1.2], [0] * 4]), abs=0.02)
        assert record["recipe"]["embedding"] is False
    # The file makes the same edit of the same model.
    measure_apply.apply(out, "demo", [tmp_path / "again"], ApplyOptions.of(max_leak=1))
    ours, theirs, base = (
        mx.load(str(folder / "model.safetensors"))
        for folder in (tmp_path / "again", edited, MODEL_PATH)
    )
    for tensor in ours:
        if tensor.endswith(ENDS):
            far, change_ = (
                float(mx.linalg.norm(ours[tensor].astype(mx.float32) - one[tensor]).item())
                for one in (theirs, base)
            )
            assert far <= 0.15 * change_ + 0.002 * float(mx.linalg.norm(base[tensor]).item())


@pytest.mark.parametrize("naive", [False, True])
def test_an_edit_is_learned_from_other_types_and_made_of_them(tmp_path: Path, naive: bool) -> None:
    """From floats and 4 bits: edited in these 4 bits, or edited first and quantized then."""
    u = subspace(1, D)
    direction = DirectionFile(mx.array(u))
    q4, edited = tmp_path / "q4.gguf", tmp_path / "edited.gguf"
    conversion.convert("demo", q4, quantize="Q4_K_M")
    options = ApplyOptions.of(strength=0.6, max_leak=1)
    if naive:
        measure_apply.apply(direction, "demo", [tmp_path / "floats"], options)
        conversion.convert(str(tmp_path / "floats"), edited, quantize="Q4_K_M")
    else:
        measure_apply.apply(direction, str(q4), [edited], options)
    out = tmp_path / "edit.safetensors"
    record = learn.learn("demo", str(edited), out)
    assert record["strength"] == pytest.approx(0.6, abs=0.05)
    assert (record["norm"], record["rank"], record["per_layer"]) == ("none", 1, False)
    assert cosines(np.array(direction_file.read(out).selected), u) > 0.99
    applied = measure_apply.apply(out, str(q4), [tmp_path / "other.gguf"], ApplyOptions())
    assert applied["leak"]["total"] < 0.01


@pytest.mark.parametrize("arch", ["gemma2", "olmo2", "qwen3_moe"])
def test_gains_and_experts(tmp_path: Path, arch: str) -> None:
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    folder = tiny.write_model(tmp_path / "m", arch, "float32", "native", **sizes)
    u = subspace(1, 128)
    experts = "0.1,1.0,1.2" if arch == "qwen3_moe" else None
    chosen = {"experts": experts} if experts else {}
    options = ApplyOptions.of(max_leak=1, **chosen)
    measure_apply.apply(DirectionFile(mx.array(u)), str(folder), [tmp_path / "edited"], options)
    record = learn.learn(str(folder), str(tmp_path / "edited"), tmp_path / "edit.safetensors")
    assert record["verdict"] == "edited"
    found = np.array(direction_file.read(tmp_path / "edit.safetensors").selected)
    assert abs(float(found[0] @ u[0])) > 0.999
    assert record["strength"] == 1.0
    assert record.experts == (experts.split(",") if experts else None)
    assert any(one.gain is not None for one in find_writers(load(folder))) == (arch != "qwen3_moe")


def lora(w: np.ndarray, name: str) -> np.ndarray:
    random = np.random.default_rng(w.shape[1])
    low = random.standard_normal((w.shape[0], 4)) @ random.standard_normal((4, w.shape[1]))
    return w + 0.2 * low * np.linalg.norm(w) / np.linalg.norm(low)


def trained(w: np.ndarray, name: str) -> np.ndarray:
    """A change along the weight's own largest directions, as long training makes."""
    u, s, v = np.linalg.svd(w, full_matrices=False)
    random = np.random.default_rng(w.shape[1])
    turn = random.standard_normal((8, 8)) / 8
    return w + u[:, :8] @ turn @ np.diag(s[:8]) @ v[:8]


NO_EDITS: dict[str, Change] = {
    "a merged LoRA": lora,
    "training": trained,
    "scaled": lambda w, name: 1.2 * w,
    "noise": lambda w, name: (
        w + 0.1 * w.std() * np.random.default_rng(w.shape[1]).standard_normal(w.shape)
    ),
    "nothing": lambda w, name: w,
}


@pytest.mark.parametrize("name", NO_EDITS)
def test_other_changes_are_no_such_edit(tmp_path: Path, name: str) -> None:
    edited = script(MODEL_PATH, tmp_path / "edited", NO_EDITS[name])
    record = learn.learn("demo", str(edited), tmp_path / "edit.safetensors")
    assert record["verdict"] in ("no such edit", "cannot tell"), record["evidence"]
    assert (record["verdict"] == "no such edit") or name == "training"
    assert not (tmp_path / "edit.safetensors").exists()
    assert record.output is None


def test_readers_are_not_taken_for_writers(tmp_path: Path) -> None:
    options = ApplyOptions.of(edit="readers", max_leak=1)
    direction = DirectionFile(mx.array(subspace(1, D)))
    measure_apply.apply(direction, "demo", [tmp_path / "edited"], options)
    record = learn.learn("demo", str(tmp_path / "edited"))
    # The output head, a reader, is the embedding too: of one weight alone nothing is claimed.
    assert record["verdict"] == "cannot tell"
    assert record.output is None
    assert "tensors that do not write to the residual stream differ" in record["evidence"][1]


def test_the_command(tmp_path: Path) -> None:
    edited = script(MODEL_PATH, tmp_path / "e", lambda w, name: removed(w, subspace(1, D)))
    out = tmp_path / "edit.safetensors"
    words = ["learn", "demo", str(edited), "-o", str(out)]
    result = CliRunner().invoke(cli, words)
    assert result.exit_code == 0, result.output
    assert f"abl-mlx apply {out} MODEL -o OUTPUT" in result.stdout
    again = CliRunner().invoke(cli, words)
    assert again.exit_code == 1
    assert "already exists" in again.stderr
    told = CliRunner().invoke(cli, ["learn", "demo", "demo", "--json", "--fail-on", "no-such-edit"])
    assert told.exit_code == 3
    assert json.loads(told.stdout)["evidence"][0] == (
        "every residual writer is the same as in the base"
    )
    other = tiny.write_model(tmp_path / "other", "llama", "float32", "native")
    strange = CliRunner().invoke(cli, ["learn", "demo", str(other)])
    assert strange.exit_code == 1
    assert "these are not the same model" in strange.stderr
