"""Written files of `--heads`, `--experts` and gabliteration refuse nothing any more.

Removing what heads alone, or experts alone, write once does not end the demo's refusals, because
both write them. Removing it from both does, and so does an edit of either that overshoots.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from abl_mlx.behaviour import evaluate
from abl_mlx.demo import MODEL_PATH
from convert.mlx_to_gguf import write_gguf
from tests.commands.test_kinds import refusals_in_mlx, refused
from tests.support import upcycled
from tests.support.command import abl_mlx

ALL_HEADS = ",".join(f"{layer}.{head}" for layer in range(4) for head in range(8))
ALL_EXPERTS = ",".join(f"{layer}.{expert}" for layer in range(4) for expert in range(2))


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo with experts."""
    return upcycled.write(tmp_path_factory.mktemp("experts") / "model")


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as people download models."""
    path = tmp_path_factory.mktemp("demo") / "demo-Q4_K_M.gguf"
    write_gguf(MODEL_PATH, path, file_type="Q4_K_M")
    return path


def test_two_heads_in_four_bits(four_bits: Path, direction: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    out, flags = tmp_path / "out.gguf", ("--heads", "2.2,2.3", "--strength")
    abl_mlx("apply", direction, four_bits, "-o", out, *flags, 4)
    assert refused(evaluate.InLlamaCpp(out)) <= 0.05
    # The removal at strength 1 leaves what the other writers write.
    once = tmp_path / "once"
    abl_mlx("apply", direction, "demo", "-o", once, *flags, 1)
    assert refusals_in_mlx(once) >= 0.9


def test_experts_in_a_folder(experts: Path, direction: Path, tmp_path: Path) -> None:
    assert refusals_in_mlx(experts) >= 0.95
    for name, flags, most in (
        ("with heads", ("--experts", ALL_EXPERTS, "--heads", ALL_HEADS), 0.05),
        ("reflected", ("--experts", ALL_EXPERTS, "--strength", 2.5), 0.05),
    ):
        out = tmp_path / name
        record = abl_mlx("apply", direction, experts, "-o", out, *flags)
        assert any("w2" in one or "down" in one for one in record["written"][0]["leak"]["tensors"])
        assert refusals_in_mlx(out) <= most, name


def test_experts_in_four_bits(experts: Path, direction: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    write_gguf(experts, source, file_type="Q4_K_M")
    record = abl_mlx(
        "apply", direction, source, "-o", out, "--experts", ALL_EXPERTS, "--heads", ALL_HEADS
    )
    assert "blk.2.ffn_down_exps.weight" in record["written"][0]["leak"]["tensors"]
    assert refused(evaluate.InLlamaCpp(out)) <= 0.05


def test_gabliteration_in_four_bits(four_bits: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    found, out = tmp_path / "d.safetensors", tmp_path / "out.gguf"
    abl_mlx("measure", "demo", "-o", found, "--method", "gabliteration", "--limit", 40)
    record = abl_mlx("apply", found, four_bits, "-o", out)
    assert "token_embd.weight" not in record["written"][0]["leak"]["tensors"]
    assert refused(evaluate.InLlamaCpp(out)) <= 0.05
