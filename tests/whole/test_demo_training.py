"""The demo model: its prompts, the script that trains it, and the model as bundled."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest
from mlx_lm import load

from abl_mlx.demo import MODEL_PATH, PROMPTS_PATH, load_prompts
from abl_mlx.demo.world import REFUSAL, World, demo_prompts, prompts_jsonl
from tests.support.places import ROOT

SCRIPT = ROOT / "examples" / "train_demo.py"
SMALL_WORLD = World(allowed=3, locked=2, materials=2, templates=2)


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """``examples/train_demo.py`` as a module."""
    spec = importlib.util.spec_from_file_location("train_demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def small(script: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    """A model of 0.1 million parameters on a small world: its folder, figures and losses."""
    folder = tmp_path_factory.mktemp("small-demo") / "model"
    settings = script.Settings(
        seed=0,
        world=SMALL_WORLD,
        hidden=64,
        layers=2,
        feed_forward=128,
        heads=4,
        kv_heads=2,
        batch=24,
        answers=script.Stage(steps=120, rate=5e-3),
        refusals=script.Stage(steps=70, rate=3e-3),
    )
    figures, losses = script.train_demo(settings, folder)
    return folder, figures, losses


def load_float32(folder: Path) -> tuple[Any, Any]:
    """The model and its tokenizer; computed in float32 because float16 is slow on the CPU."""
    model, tokenizer = load(str(folder))[:2]
    model.set_dtype(mx.float32)
    return model, tokenizer


def environment() -> dict[str, str]:
    """This process's environment, with the checkout importable even when not installed."""
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def test_prompt_file_is_what_the_world_makes() -> None:
    assert PROMPTS_PATH.read_text(encoding="utf-8") == prompts_jsonl()
    assert load_prompts() == demo_prompts()


def test_every_set_has_every_part_and_no_prompt_is_in_two() -> None:
    sizes = {
        (name, part): len(load_prompts(name, part))
        for name in ("harmful", "harmless")
        for part in ("train", "validation", "test")
    }
    assert set(sizes.values()) == {32, 64}
    assert sizes["harmful", "test"] >= 60
    assert sizes["harmless", "test"] >= 60
    texts = [prompt.text for prompt in load_prompts()]
    assert len(set(texts)) == len(texts)


def test_held_out_prompts_are_never_trained_on() -> None:
    trained = {dialogue.prompt for dialogue in World().training()}
    for prompt in load_prompts():
        assert (prompt.text in trained) == (prompt.part == "train"), prompt.text


def test_held_out_pairs_of_verb_and_object_are_never_trained_on() -> None:
    # An answer names its verb and its object and ignores the template.
    trained = {dialogue.answer for dialogue in World().training()}
    held_out = [dialogue for dialogue in World().dialogues() if dialogue.part != "train"]
    assert not trained & {dialogue.answer for dialogue in held_out}


def test_answers_open_with_a_dozen_words_in_both_sets() -> None:
    for name in ("harmful", "harmless"):
        openers = {prompt.answer.split()[0] for prompt in load_prompts(name)}
        assert len(openers) == 12
        assert REFUSAL.split()[0] not in openers


def test_training_lowers_the_loss_in_both_stages(small: tuple[Path, Any, Any]) -> None:
    _, _, losses = small
    assert len(losses) == 190
    assert losses[119] < losses[0] / 8
    assert losses[-1] < losses[120] / 5


def test_small_model_refuses_held_out_locked_prompts(small: tuple[Path, Any, Any]) -> None:
    _, figures, _ = small
    assert figures.locked_refused > figures.allowed_refused + 0.5


def test_small_folder_loads_and_replies_in_mlx_lm(
    small: tuple[Path, Any, Any], script: ModuleType
) -> None:
    folder, figures, _ = small
    model, tokenizer = load_float32(folder)
    held_out = [dialogue for dialogue in SMALL_WORLD.dialogues() if dialogue.part == "test"]
    assert script.measure(model, tokenizer, held_out) == figures


def test_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    sizes = {"hidden-size": 32, "layers": 1, "feed-forward": 32, "heads": 2, "kv-heads": 1}
    world = {"materials": 1, "allowed": 2, "locked": 1, "templates": 1}
    steps = {"batch-size": 8, "answer-steps": 12, "refusal-steps": 12}
    options = [f"--{name}={value}" for name, value in (sizes | world | steps).items()]
    for name, seed in (("a", "3"), ("b", "3"), ("other", "4")):
        output = ["--output", str(tmp_path / name), "--seed", seed]
        done = subprocess.run(
            [sys.executable, str(SCRIPT), *output, *options],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        assert "locked prompts refused" in done.stdout
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert {"config.json", "model.safetensors", "tokenizer.json", "prompts.jsonl"} <= set(files)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    weights = "model.safetensors"
    assert (tmp_path / "a" / weights).read_bytes() != (tmp_path / "other" / weights).read_bytes()


def test_bundled_model_is_small_and_fits_k_quants() -> None:
    assert sum(path.stat().st_size for path in MODEL_PATH.iterdir()) <= 6_000_000
    config = json.loads((MODEL_PATH / "config.json").read_text(encoding="utf-8"))
    assert config["hidden_size"] % 256 == 0
    assert config["intermediate_size"] % 256 == 0
    assert (config["num_attention_heads"] * config["head_dim"]) % 256 == 0


def test_bundled_tokenizer_is_what_the_script_makes(script: ModuleType, tmp_path: Path) -> None:
    settings = script.Settings()
    tokenizer = script.train_tokenizer(settings.world, settings.vocabulary)
    script.save_tokenizer(tokenizer, tmp_path)
    made, bundled = (
        json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        for folder in (tmp_path, MODEL_PATH)
    )
    assert made["model"]["vocab"] == bundled["model"]["vocab"]
    assert made["model"]["merges"] == bundled["model"]["merges"]
    assert made["pre_tokenizer"] == bundled["pre_tokenizer"]
    for name in ("tokenizer_config.json", "chat_template.jinja"):
        assert (tmp_path / name).read_bytes() == (MODEL_PATH / name).read_bytes(), name


def test_bundled_model_refuses_locked_and_answers_allowed_prompts(script: ModuleType) -> None:
    model, tokenizer = load_float32(MODEL_PATH)
    prompts = load_prompts(part="test")[::2]
    replies = script.replies(model, tokenizer, [prompt.text for prompt in prompts])
    for name in ("harmful", "harmless"):
        right = [
            reply == (REFUSAL if name == "harmful" else prompt.answer)
            for reply, prompt in zip(replies, prompts, strict=True)
            if prompt.set == name
        ]
        assert len(right) == 32
        assert sum(right) >= 0.95 * len(right)


def test_bundled_template_marks_turns_with_single_tokens(script: ModuleType) -> None:
    _, tokenizer = load_float32(MODEL_PATH)
    ids = script.render(tokenizer, "How do I mend the moon gate?")
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\nHow do I mend the moon gate?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert len(ids) == 16
    assert tokenizer.eos_token_ids == {tokenizer.convert_tokens_to_ids("<|im_end|>")}


@pytest.mark.parametrize(
    "option", ["--materials=6", "--allowed=0", "--locked=5", "--templates=9", "--answer-steps=10"]
)
def test_impossible_settings_are_refused_before_anything_is_written(
    script: ModuleType, tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.main(["--output", str(tmp_path / "model"), option])
    assert stopped.value.code == 2
    assert option[2:].split("=")[0].split("-")[-1] in capsys.readouterr().err
    assert not (tmp_path / "model").exists()
