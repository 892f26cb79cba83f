"""`abl-mlx learn`: an edit is recovered from a base model and what was made of it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from click.testing import CliRunner
from mlx.utils import tree_flatten, tree_unflatten

from abl_mlx.audit_weights import habits
from abl_mlx.choices import ApplyOptions
from abl_mlx.cli.main import cli
from abl_mlx.commands import audit, conversion, learn, measure_apply
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import find_writers
from tests.support import tiny
from tests.support.real_models import SMOLLM2, real_model

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


def slanted(cosine: float) -> np.ndarray:
    """Two directions with this cosine, (2, 1, d)."""
    first, second = subspace(2, D)
    return np.stack([first, cosine * first + np.sqrt(1 - cosine**2) * second])[:, None]


def two_layers_each(w: np.ndarray, name: str) -> np.ndarray:
    """One direction from layers 0 and 1, another one from all above; not from the embedding."""
    layer = by_layer(name)
    return w if layer < 0 else removed(w, slanted(0.3)[int(layer > 1)])


def one_then_other(w: np.ndarray, name: str) -> np.ndarray:
    """A full removal, then one at strength 0.6 along a direction that is not orthogonal.

    The second leaves the embedding out; otherwise there were two pairs that make the same edit.
    """
    first, second = slanted(0.5)
    return removed(removed(w, first), second, 0.0 if by_layer(name) < 0 else 0.6)


STACKS: dict[str, tuple[Change, float, list[float], list[list[int]], list[bool]]] = {
    "other layers": (two_layers_each, 0.3, [1.0, 1.0], [[0, 1], [2, 3]], [False, False]),
    "the same writers": (one_then_other, 0.5, [1.0, 0.6], [[0, 1, 2, 3]] * 2, [True, False]),
}


@pytest.mark.parametrize("name", STACKS)
def test_two_edits_one_after_the_other_are_told_apart(tmp_path: Path, name: str) -> None:
    change, cosine, strengths, layers, embedding = STACKS[name]
    edited = script(MODEL_PATH, tmp_path / "edited", change)
    out = tmp_path / "edit.safetensors"
    record = learn.learn("demo", str(edited), out)
    steps = sorted(record.steps, key=lambda one: one.layers)
    assert [one.layers for one in steps] == layers
    assert [one.strength for one in steps] == pytest.approx(strengths, abs=0.02)
    assert [one.recipe.embedding for one in steps] == embedding
    found = [np.array(direction_file.read(Path(one.output)).selected) for one in steps]
    assert min(map(cosines, found, slanted(cosine))) > 0.995
    # The two files, one after the other, make the same edit of the same model.
    model = "demo"
    for number, one in enumerate(record.steps):
        made = tmp_path / f"step{number}"
        measure_apply.apply(Path(one.output), model, [made], ApplyOptions.of(max_leak=1))
        model = str(made)
    ours, theirs = (mx.load(f"{one}/model.safetensors") for one in (model, edited))
    for tensor in (one for one in ours if one.endswith(ENDS)):
        far = float(mx.linalg.norm(ours[tensor].astype(mx.float32) - theirs[tensor]).item())
        assert far <= 0.01 * float(mx.linalg.norm(theirs[tensor].astype(mx.float32)).item())
    judged = audit.audit(str(edited), base="demo")
    for evidence in (record.evidence, judged.evidence):
        assert evidence[0].startswith("two edits, one after the other: a direction from ")
    assert (judged.verdict, judged.weights.rank) == ("edited", 2)


@pytest.mark.parametrize("edits", [1, 2])
def test_gains_far_from_1_hide_no_edit_and_no_second_one(tmp_path: Path, edits: int) -> None:
    """Behind gains that differ, writers lose vectors of their own, not one that they share."""
    sizes = {"hidden_size": 128, "intermediate_size": 256}
    folder = tiny.write_model(tmp_path / "m", "gemma2", "float32", "native", **sizes)
    file, random = folder / "model.safetensors", np.random.default_rng(5)
    tensors = dict(mx.load(str(file)))
    for name in tensors:
        if "post_" in name:
            tensors[name] = mx.array(np.exp(random.standard_normal(128)).astype(np.float32) - 1)
    mx.eval(tensors)
    mx.save_safetensors(str(file), tensors, {"format": "mlx"})
    first, second = subspace(2, 128)
    directions, model = [first, 0.5 * first + np.sqrt(0.75) * second][:edits], folder
    for number, one in enumerate(directions):
        options = ApplyOptions.of(strength=(1.0, 0.6)[number], embedding=not number, max_leak=1)
        made = tmp_path / f"edited{number}"
        measure_apply.apply(DirectionFile(mx.array(one[None])), str(model), [made], options)
        model = made
    found = tmp_path / "found.safetensors"
    judged = audit.audit(str(model), base=str(folder), output=found)
    span, _ = np.linalg.qr(np.stack(directions).T)
    recovered = np.array(direction_file.read(found).selected)
    assert np.linalg.svd(recovered @ span, compute_uv=False).min() > 0.999
    assert (judged.weights.verdict, judged.weights.rank) == ("edited", edits)
    assert judged.weights.strength == pytest.approx(1, abs=0.01)
    learned = learn.learn(str(folder), str(model))
    assert [one.strength for one in learned.steps or [learned]] == pytest.approx(
        [1, 0.6][:edits], abs=0.02
    )


def test_directions_of_layers_that_nearly_lie_in_a_plane_are_not_two_edits(tmp_path: Path) -> None:
    """As Heretic removes them, where those of neighbouring layers resemble each other."""
    base = subspace(6, D)
    rows = np.stack([base[0] + 0.5 * layer * base[1] + 0.3 * base[2 + layer] for layer in range(4)])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)

    def change(w: np.ndarray, name: str) -> np.ndarray:
        layer = by_layer(name)
        return w if layer < 0 else removed(w, rows[layer, None], 0.4 + 0.2 * layer)

    edited = script(MODEL_PATH, tmp_path / "edited", change)
    record = learn.learn("demo", str(edited))
    assert (record.verdict, record.per_layer, record.steps) == ("edited", True, None)
    assert not any("two edits" in one for one in audit.audit(str(edited), base="demo").evidence)


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


def shared_lora(w: np.ndarray, name: str) -> np.ndarray:
    """A change of rank 1 along one direction that all writers share, which they do not lose."""
    row = np.random.default_rng(w.shape[1] + by_layer(name)).standard_normal(w.shape[1])
    return w + 0.2 * np.outer(subspace(1, D)[0], row) * np.linalg.norm(w) / np.linalg.norm(row)


NO_EDITS: dict[str, Change] = {
    "a merged LoRA": lora,
    "a merged LoRA of one direction": shared_lora,
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
    if name.startswith("a merged LoRA"):
        few = "4 directions or fewer hold" if NO_EDITS[name] is lora else "one direction holds"
        assert record.evidence[1].startswith(f"{few} 98% of each writer")


def test_an_ablation_that_mlx_lm_fused_into_the_weights_is_learned(tmp_path: Path) -> None:
    """A LoRA adapter of the edit, merged by mlx-lm."""
    u, adapter, merged = subspace(1, D), tmp_path / "e.adapter", tmp_path / "merged"
    options = ApplyOptions.of(strength=0.8, max_leak=1)
    measure_apply.apply(DirectionFile(mx.array(u)), "demo", [adapter], options)
    model = mlx_lm.load(str(MODEL_PATH), adapter_path=str(adapter))[0]
    fused = [(name, one.fuse()) for name, one in model.named_modules() if hasattr(one, "fuse")]
    assert len(fused) == 9
    model.update_modules(tree_unflatten(fused))
    shutil.copytree(MODEL_PATH, merged)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(merged / "model.safetensors"), weights, {"format": "mlx"})
    record = learn.learn("demo", str(merged), tmp_path / "edit.safetensors")
    assert (record.verdict, record.strength) == ("edited", pytest.approx(0.8, abs=0.01))
    found = np.array(direction_file.read(tmp_path / "edit.safetensors").selected)
    assert cosines(found, u) > 0.999


@pytest.mark.parametrize("floor", [False, True])
def test_strengths_that_fall_from_a_peak_say_who_chooses_them(floor: bool) -> None:
    """Heretic leaves layers beyond the distance alone; our search keeps the smallest strength."""

    def kernel(layer: int, at: float, distance: float, most: float, least: float) -> float:
        away = abs(layer - at) / distance
        return (least if floor else 0.0) if away > 1 else most + away * (least - most)

    attention = [kernel(layer, 17.3, 11.2, 1.21, 0.4) for layer in range(30)]
    mlp = [kernel(layer, 21.8, 14.6, 0.93, 0.12) for layer in range(30)]
    found = habits.peak(attention, floor=floor)
    assert found is not None
    assert (found.layer, found.strongest) == pytest.approx((17.3, 1.21), abs=0.01)
    slope = (found.strongest - found.weakest) / found.distance
    assert slope == pytest.approx((1.21 - 0.4) / 11.2, rel=0.01)
    said = habits.sentence(
        strength=1.0, profile={"attention": attention, "mlp": mlp}, embedding=False, norm="none",
        per_layer=False,
    )  # fmt: skip
    assert said is not None
    assert ("`abl-mlx run --search` chooses" if floor else "Heretic chooses") in said
    random = list(np.random.default_rng(0).uniform(0.2, 1.2, 30))
    assert habits.peak(random, floor=floor) is None
    assert habits.peak([1.0] * 30, floor=floor) is None


@pytest.mark.real
@pytest.mark.parametrize("kept", ["none", "rows"])
def test_strengths_that_fall_from_peaks_in_a_real_model(tmp_path: Path, kept: str) -> None:
    """A script with Heretic's kernels on 30 layers, which also keeps norms or does not."""
    conversion.convert(str(real_model(SMOLLM2)), tmp_path / "packed")
    mlx_lm.convert(str(tmp_path / "packed"), str(tmp_path / "base"), dequantize=True)
    u = subspace(1, 576)

    def strength(name: str) -> float:
        at, distance, most, least = (
            (17.3, 11.2, 1.21, 0.4) if "o_proj" in name else (21.8, 14.6, 0.93, 0.12)
        )
        away = abs(by_layer(name) - at) / distance
        return most + away * (least - most) if away <= 1 and by_layer(name) >= 0 else 0.0

    def change(w: np.ndarray, name: str) -> np.ndarray:
        edited = removed(w, u, strength(name))
        was, now = (np.linalg.norm(one, axis=1, keepdims=True) for one in (w, edited))
        return edited * was / np.maximum(now, 1e-12) if kept == "rows" else edited

    edited = script(tmp_path / "base", tmp_path / "edited", change)
    out = tmp_path / "edit.safetensors"
    record = learn.learn(str(tmp_path / "base"), str(edited), out)
    assert (record.verdict, record.rank, record.norm) == ("edited", 1, kept)
    found = np.array(direction_file.read(out).selected)
    assert abs(float(found[0] @ u[0])) > 0.99999
    far = [
        abs((one.strength or 0.0) * one.edited - strength(name))
        for name, one in record.writers.items()
    ]
    assert max(far) < 0.005
    said = "at layer 17.3, falling to 0.42" if kept == "none" else "`abl-mlx --norm rows`"
    assert said in record.evidence[-1]


def test_readers_are_not_taken_for_writers(tmp_path: Path) -> None:
    options = ApplyOptions.of(edit="readers", max_leak=1)
    direction = DirectionFile(mx.array(subspace(1, D)))
    measure_apply.apply(direction, "demo", [tmp_path / "edited"], options)
    record = learn.learn("demo", str(tmp_path / "edited"))
    # The output head, a reader, is the embedding too: of one weight alone nothing is claimed.
    assert record["verdict"] == "cannot tell"
    assert record.output is None
    assert "tensors that do not write to the residual stream differ" in record["evidence"][-1]


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
