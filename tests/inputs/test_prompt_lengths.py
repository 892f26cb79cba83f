"""Prompts longer than a model's context are found before any long work."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from abl_mlx import demo
from abl_mlx.commands import prompt_lengths
from abl_mlx.inputs import prompts
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets, Split
from abl_mlx.models import context_length
from abl_mlx.outputs.model_file import find_model
from convert.base.errors import UserError
from convert.mlx_to_gguf import write_gguf
from tests.support.command import abl_mlx, fails

LONG = "Tell me all about it. " * 120  # 1,700 tokens; the demo's context is 512


@pytest.fixture(scope="module")
def gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(demo.MODEL_PATH, tmp_path_factory.mktemp("gguf") / "demo.gguf").path


@pytest.fixture(scope="module")
def models(gguf: Path) -> Sequence[str]:
    return ("demo", str(gguf))


def files(place: Path, long: int) -> tuple[Path, Path]:
    """A harmful set of 21 prompts or more, of which ``long`` are too long, and a harmless one."""
    rows = [json.loads(line) for line in demo.PROMPTS_PATH.read_text().splitlines()]
    texts = {name: [row["text"] for row in rows if row["set"] == name] for name in
             ("harmful", "harmless")}  # fmt: skip
    many = [*texts["harmful"][:20], *(LONG + text for text in texts["harmful"][20 : 20 + long])]
    harmful, harmless = place / "harmful.txt", place / "harmless.txt"
    harmful.write_text("\n".join(many))
    harmless.write_text("\n".join(texts["harmless"][:30]))
    return harmful, harmless


@pytest.mark.parametrize("kind", [0, 1], ids=["MLX", "GGUF"])
def test_one_that_is_too_long_is_left_out(
    kind: int, models: Sequence[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    harmful, harmless = files(tmp_path, 1)
    sets = prompts.load_sets(str(harmful), str(harmless), 0)
    fitting = prompt_lengths.fitting(sets, find_model(models[kind]))
    parts = ("train", "validation", "test")
    assert sum(len(getattr(sets.harmful, part)) for part in parts) == 21
    assert sum(len(getattr(fitting.harmful, part)) for part in parts) == 20
    assert fitting.harmless == sets.harmless
    said = capsys.readouterr().err
    assert "left out: 1 of 21 prompts of" in said
    assert "context of 512 tokens: 1,69" in said
    record = abl_mlx(
        "eval", models[kind], "--harmful", harmful, "--harmless", harmless, "--max-tokens", 4
    )
    assert record["n_harmful"] == len(fitting.harmful.test)


@pytest.mark.parametrize("kind", [0, 1], ids=["MLX", "GGUF"])
@pytest.mark.parametrize(
    "command",
    [
        ["measure", "-o", "{}/d.safetensors"],
        ["measure", "--search", "5", "-o", "{}/d.safetensors"],
        ["run", "-o", "{}/out"],
        ["run", "--induce", "-o", "{}/out.cvec.gguf"],
        ["eval"],
        ["show", "Hello"],
        ["chat"],
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_several_are_refused_by_every_command(
    command: list[str], kind: int, models: Sequence[str], tmp_path: Path
) -> None:
    harmful, harmless = files(tmp_path, 3)
    name, *rest = (word.replace("{}", str(tmp_path)) for word in command)
    said = fails(name, models[kind], *rest, "--harmful", harmful, "--harmless", harmless)
    assert f"3 of 23 prompts of {harmful} are longer than" in said
    assert "context of 512 tokens" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["harmful.txt", "harmless.txt"]


def test_a_prompt_that_was_typed_is_refused(tmp_path: Path) -> None:
    said = fails("show", "demo", LONG, "--direction", _direction(tmp_path))
    assert "tokens in the chat template, and the context of" in said


def _direction(place: Path) -> Path:
    import numpy as np

    path = place / "r.npy"
    np.save(path, np.random.default_rng(0).normal(size=256).astype(np.float32))
    return path


def test_a_part_is_never_emptied(models: Sequence[str]) -> None:
    few = PromptSet("few.txt/train", (Prompt(LONG),))
    split = Split(few, few, few)
    sets = PromptSets(split, split, None)
    with pytest.raises(UserError, match="Shorten or remove them"):
        prompt_lengths.fitting(sets, find_model("demo"))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, None),
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"text_config": {"max_position_embeddings": 8192}}, 8192),
        # Qwen's YaRN says the length before scaling, Llama 3 the one after.
        (
            {
                "max_position_embeddings": 32768,
                "rope_scaling": {"factor": 4.0, "original_max_position_embeddings": 32768},
            },
            131072,
        ),
        (
            {
                "max_position_embeddings": 131072,
                "rope_scaling": {"factor": 8.0, "original_max_position_embeddings": 8192},
            },
            131072,
        ),
        ({"max_position_embeddings": 4096, "rope_scaling": {"factor": 2.0}}, 8192),
        ({"max_position_embeddings": 4096, "rope_scaling": {"short_factor": [1.0]}}, 4096),
    ],
)
def test_the_context_by_a_config(config: dict[str, object], expected: int | None) -> None:
    assert context_length.of_config(config) == expected


def test_the_context_by_metadata() -> None:
    known = {"general.architecture": "qwen2", "qwen2.context_length": 32768}
    assert context_length.of_metadata(known) == 32768
    known |= {"qwen2.rope.scaling.factor": 4.0}
    assert context_length.of_metadata(known) == 131072
    assert context_length.of_metadata({"general.architecture": "mamba"}) is None
