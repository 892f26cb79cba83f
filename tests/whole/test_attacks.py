"""`attacks` finds what is planted, repeats its cases, and is withstood."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from attacks import gguf_mutations, mutations
from attacks.verdict import of_output
from tests.support.places import ROOT
from tests.support.tiny_gguf import Recipe, write


def _program(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=900
    )


def test_planted_faults_are_found() -> None:
    ended = _program("tests.support.planted_faults")
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout)
    assert found.pop("succeed 1") == ["accepted"] * 11
    assert {name.removesuffix(" 0"): kinds for name, kinds in found.items()} == {
        "succeed": ["accepted"],
        "fail": ["sentence"],
        "blow_up": ["traceback"],
        "hang": ["hang"],
        "crash": ["crash"],
        "leave": ["crash"],
        "paint": ["control"],
        "paint_from_native_code": ["control"],
        "fill": ["memory"],
        "leave_a_part": ["partial"],
        "say_nothing": ["unclear"],
    }


@pytest.mark.parametrize(
    ("code", "output", "kind"),
    [
        (0, "fine\n\tindented é 🙂\n", "accepted"),
        (3, "limits were not met\n", "accepted"),
        (1, "warning: odd\nError: x is damaged.\n", "sentence"),
        (2, "Usage: abl-mlx\n\nError: No such option.\n", "sentence"),
        (1, "Error: " + "x" * 2000, "unclear"),
        (1, "x is damaged.\n", "unclear"),
        (70, "Error: x.\n", "unclear"),
        (1, "Error: a\u202eb.\n", "control"),
        (0, "a\rb\n", "control"),
        (1, "Error: \x9b2J.\n", "control"),
        (1, "Traceback (most recent call last):\n  File x\nError: x", "traceback"),
    ],
)
def test_verdicts_on_output(code: int, output: str, kind: str) -> None:
    assert of_output(code, None, output).kind == kind


def test_mutations_leave_their_input_and_are_repeated_by_a_seed() -> None:
    document = {"a": [1, {"b": "text"}], "c": None, "d": 2.5}
    raw = json.dumps(document).encode()
    first = [mutations.json_bytes(Random(n), raw) for n in range(300)]
    assert first == [mutations.json_bytes(Random(n), raw) for n in range(300)]
    assert document == json.loads(raw)
    assert len(set(first)) > 200


def test_a_gguf_is_taken_apart_and_put_together(tmp_path: Path) -> None:
    recipe = Recipe("llama", {"block_count": 1}, {"token_embd.weight": (512, 64)})
    raw = write(tmp_path / "model.gguf", recipe).read_bytes()
    file = gguf_mutations.read(raw)
    assert bytes(file) == raw
    assert [entry.name for entry in file.entries] == [b"token_embd.weight"]
    changed = {gguf_mutations.mutate(Random(n), raw) for n in range(100)}
    assert len(changed) > 70


def _withstood(*arguments: str) -> None:
    ended = _program("attacks", "--jobs", "2", *arguments)
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.slow
def test_inputs_of_every_kind_are_withstood() -> None:
    _withstood("--cases", "60", "--seed", "tests")
