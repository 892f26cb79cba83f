"""`--method rome`, from the command line to files that mlx-lm and llama.cpp run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import rates
from abl_mlx.choices import Editing
from abl_mlx.commands.edit_choice import edit_of
from abl_mlx.demo import MODEL_PATH
from abl_mlx.directions import direction_file
from abl_mlx.edits.steering import ablation
from abl_mlx.inputs import prompts
from abl_mlx.models import chat_model
from abl_mlx.models.writers import find_writers
from abl_mlx.outputs import adapter_outputs
from abl_mlx.records.directions import Chosen
from abl_mlx.reports import tables
from convert.gguf.file import GgufSource
from tests.commands.test_kinds import misused
from tests.commands.test_undo import tensors
from tests.outputs.test_mlx_quantized import quantize
from tests.support import small_models
from tests.support.command import abl_mlx, fails

HELD_OUT = prompts.load_demo().harmful.test.take(20)


def refused(model: evaluate.InLlamaCpp) -> float:
    """The share of held-out harmful prompts that llama.cpp refuses with this file."""
    return rates(model(HELD_OUT.texts, 32), HELD_OUT.prompts).refusal_rate


def refused_in_mlx(chat: chat_model.ChatModel) -> float:
    replies = evaluate.in_mlx(chat)(HELD_OUT.prompts, 32)
    return rates(replies, HELD_OUT.prompts).refusal_rate


@pytest.fixture(scope="module")
def rome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The demo's changes as a direction file, and what `measure` says of them."""
    path = tmp_path_factory.mktemp("rome") / "rome.safetensors"
    return path, abl_mlx("measure", "demo", "--method", "rome", "-o", path)


def test_measure_writes_the_changes_and_their_effect(rome: tuple[Path, dict[str, Any]]) -> None:
    path, record = rome
    chosen = record["direction"]
    assert chosen["method"] == "rome"
    assert chosen["refused"] == 0
    assert chosen["validation_kl"] < 0.001
    assert record["updates"][0] == chosen["update"]
    assert chosen["forward_tokens"] < 25000
    file = direction_file.read(path)
    assert file.updates is not None
    first, last = chosen["update"]["layers"]
    told = tables.summary_line(Chosen.of(chosen))
    assert told == f"rome, MLPs of layers {first} to {last}"
    assert sorted(file.updates) == list(range(first, last + 1))
    assert all(one.left.shape == (256, 1) for one in file.updates.values())
    assert all(one.right.shape == (1, 512) for one in file.updates.values())
    assert file.sha256 == chosen["sha256"]


def test_the_record_alone_makes_the_changes_again(
    rome: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    abl_mlx("apply", rome[0], "demo", "-o", tmp_path / "edited")
    alone = shutil.copy(tmp_path / "edited" / "abl.json", tmp_path)
    found = abl_mlx("reproduce", alone, "-o", tmp_path / "again")
    assert (found["verdict"], found["differing"]) == ("identical", [])
    ours, theirs = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "edited")
    )
    assert ours == theirs != (MODEL_PATH / "model.safetensors").read_bytes()


@pytest.mark.slow  # a minute of gradients
def test_strengths_of_the_changes_are_learned(
    rome: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "learned.safetensors"
    said = "measure", "demo", "--method", "rome", "--learn-strengths", "4"
    chosen = abl_mlx(*said, "-o", path)["direction"]
    assert chosen["backward_tokens"] > 0
    strengths = np.array(chosen["update"]["strengths"])
    first, last = chosen["update"]["layers"]
    assert chosen["refused"] == 0
    assert chosen["validation_kl"] <= 0.95 * chosen["uniform_kl"]
    assert chosen["chosen_by"].endswith("strengths of each layer learned by gradients")
    plain, scaled = (direction_file.read(one).updates or {} for one in (rome[0], path))
    for layer, strength in zip(range(first, last + 1), strengths, strict=True):
        if strength:
            expected = strength * plain[layer].left
            assert np.allclose(scaled[layer].left, expected, rtol=1e-3, atol=1e-6)


def test_apply_writes_a_folder_and_an_adapter(
    rome: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out, adapter = tmp_path / "out", tmp_path / "out.adapter"
    for place, flags in ((out, ["--keep-undo"]), (adapter, [])):
        record = abl_mlx("apply", rome[0], "demo", "-o", place, *flags)
        assert record["leak"]["total"] < 1e-3
    for chat in (
        chat_model.load(out, check=False),
        chat_model.load(MODEL_PATH, check=False, adapter=adapter),
    ):
        assert refused_in_mlx(chat) == 0
    layers = sorted(direction_file.read(rome[0]).updates or {})
    label = json.loads((out / "config.json").read_text())["abl_mlx"]
    assert label["updates"] == ",".join(map(str, layers))
    # Undone by the file of removed components, or by the changes themselves.
    for flags in ((), ("--direction", rome[0])):
        if flags:
            (out / "undo.safetensors").unlink()
        back = tmp_path / f"back{len(flags)}"
        abl_mlx("undo", out, "-o", back, *flags)
        was, edited, now = tensors(MODEL_PATH), tensors(out), tensors(back)
        for name, values in was.items():
            step = 2.0**-10 * np.maximum(np.abs(values), np.abs(edited[name]))
            assert (np.abs(now[name] - values) <= 2 * (step + step.mean())).all(), name
        assert sum((edited[name] != was[name]).any() for name in was) == len(layers)
    said = fails("undo", out, "-o", tmp_path / "b.adapter", "--direction", rome[0])
    assert "--method rome" in said


def test_the_edit_at_runtime_is_that_of_the_files(
    rome: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    abl_mlx("apply", rome[0], "demo", "-o", tmp_path / "out", "--strength", "0.5")
    chat = chat_model.load(MODEL_PATH)
    tokens = mx.array([chat.encode(HELD_OUT.prompts[0])])
    with ablation(find_writers(chat), edit_of(direction_file.read(rome[0]), Editing(0.5))):
        steered = chat.model(tokens)
    written = chat_model.load(tmp_path / "out", check=False).model(tokens)
    plain = chat.model(tokens)
    assert mx.abs(written - steered).max().item() < 0.02 * mx.abs(plain - steered).max().item()


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K"])
def test_quantized_files_end_refusals_in_llamacpp(
    rome: tuple[Path, dict[str, Any]], tmp_path: Path, kind: str
) -> None:
    """Each weight's change is far below a step, and rows still do to keys what they should."""
    pytest.importorskip("xllamacpp")
    source, out, lora = tmp_path / "s.gguf", tmp_path / "out.gguf", tmp_path / "out.lora.gguf"
    abl_mlx("convert", "demo", source, "--quantize", kind)
    record = abl_mlx("apply", rome[0], source, "-o", out, "-o", lora)
    assert all(one["leak"]["total"] < 0.01 for one in record["written"])
    assert refused(evaluate.InLlamaCpp(out)) <= 0.05
    assert refused(evaluate.InLlamaCpp(source, lora)) <= 0.05
    updates = direction_file.read(rome[0]).updates or {}
    with GgufSource(source) as before, GgufSource(out) as after:
        for layer, one in updates.items():
            name = f"blk.{layer}.ffn_down.weight"
            moved = (after.values(name).astype(np.float64) - before.values(name)) @ one.right[0]
            wanted = one.left[:, 0].astype(np.float64) * (one.right[0] @ one.right[0])
            assert np.linalg.norm(moved - wanted) < 0.01 * np.linalg.norm(wanted)
        with adapter_outputs.in_mlx(before, lora) as chat:
            assert refused_in_mlx(chat) <= 0.05


def test_a_quantized_folder_keeps_it(rome: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    four = tmp_path / "four"
    quantize(MODEL_PATH, four, bits=4, group_size=64)
    record = abl_mlx("apply", rome[0], four, "-o", tmp_path / "out")
    assert record["leak"]["total"] < 0.01
    assert refused_in_mlx(chat_model.load(tmp_path / "out", check=False)) <= 0.05


def test_a_model_that_one_direction_does_not_free(tmp_path: Path) -> None:
    """Of hard the best single direction leaves 41% of refusals; changes of MLPs leave none."""
    folder = small_models.folder("hard")
    prompts = ("--harmful", folder / "locked.txt", "--harmless", folder / "allowed.txt")
    record = abl_mlx("run", folder, "--method", "rome", *prompts, "-o", tmp_path / "out.gguf")
    for one in record["evaluations"]:
        assert one["after"]["harmful_refusal_rate"] <= 0.05
        assert one["kl"]["k1"] < 0.001


def test_flags_of_directions_have_no_meaning(
    rome: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    given = ("--rank", "2"), ("--layer", "2"), ("--layer", "0"), ("--search", "5")
    for flags in (*given, ("--norm", "columns")):
        said = misused("run", "demo", "--method", "rome", *flags, "-o", out)
        assert flags[0] in said
    assert "--layers" in misused("apply", rome[0], "demo", "--layers", "1-2", "-o", out)
    assert not out.exists()
