"""`abl-mlx convert` of a GGUF to a GGUF: other types, with and without an importance matrix."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result

from abl_mlx.cli.main import cli
from abl_mlx.commands.conversion import convert
from convert.gguf import imatrix
from convert.gguf.file import GgufSource, metadata, tensor_types


@pytest.fixture(scope="module")
def importance(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    with GgufSource(floats) as opened:
        sums = {
            name: np.exp(random.standard_normal((1, entry.shape[-1])))
            for name, entry in opened.tensors.items()
            if len(entry.shape) > 1 and name.startswith("blk.")
        }
    path = tmp_path_factory.mktemp("importance") / "importance.gguf"
    imatrix.write(path, sums, {name: np.ones(1) for name in sums}, ["noise"], 100)
    return path


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, ["convert", *map(str, arguments)])


def test_a_gguf_gets_another_type_as_the_folder_does(floats: Path, tmp_path: Path) -> None:
    out, same = tmp_path / "out.gguf", tmp_path / "same.gguf"
    result = run(floats, out, "--quantize", "Q4_K_M", "--json")
    assert result.exit_code == 0, result.stderr
    record = json.loads(result.stdout)
    assert record["tensors"]["Q4_K"] > record["tensors"]["Q6_K"] > 0
    assert record.get("note") is None
    convert("demo", same, quantize="Q4_K_M")
    with GgufSource(out) as one, GgufSource(same) as other:
        for name, entry in other.tensors.items():
            assert one.tensors[name].type == entry.type
        # The folder is float32, and F16 rounds it first, so only shapes of error are compared.
        assert metadata(out)["general.file_type"] == metadata(same)["general.file_type"] == 15


def test_an_importance_matrix_changes_bytes_and_is_named(
    floats: Path, importance: Path, tmp_path: Path
) -> None:
    for source in (str(floats), "demo"):
        plain, weighted = tmp_path / f"plain-{source[:1]}.gguf", tmp_path / f"w-{source[:1]}.gguf"
        convert(source, plain, quantize="Q4_K_M")
        convert(source, weighted, quantize="Q4_K_M", imatrix=importance)
        assert metadata(weighted)["quantize.imatrix.dataset"] == "noise"
        assert "quantize.imatrix.file" not in metadata(plain)
        name = "blk.1.ffn_up.weight"
        with GgufSource(plain) as one, GgufSource(weighted) as other:
            assert not np.array_equal(one.raw(name), other.raw(name))


def test_a_note_tells_of_tensors_that_were_quantized_before(floats: Path, tmp_path: Path) -> None:
    eight, four = tmp_path / "eight.gguf", tmp_path / "four.gguf"
    convert(str(floats), eight, quantize="Q8_0")
    result = run(eight, four, "--quantize", "Q4_K_M")
    assert "29 tensors were quantized already and lost precision again" in result.output
    kept = tmp_path / "kept.gguf"
    assert "note:" not in run(eight, kept, "--quantize", "Q4_K_M", "--keep-types").output
    assert tensor_types(kept) == tensor_types(eight)
    assert metadata(kept)["general.file_type"] == metadata(eight)["general.file_type"] == 7


def test_keys_of_an_importance_matrix_stay(floats: Path, importance: Path, tmp_path: Path) -> None:
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    convert(str(floats), first, quantize="Q8_0", imatrix=importance)
    convert(str(first), second, quantize="Q4_K_M")
    assert metadata(second)["quantize.imatrix.file"] == "importance.gguf"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["o.gguf"], "--quantize"),
        (["o.gguf", "--quantize", "Q9"], "Q9 is not a supported GGUF file type"),
        (["o.gguf", "--quantize", "IQ2_XS"], "--imatrix FILE"),
        (["o.gguf", "--quantize", "Q4_K_M", "--imatrix", "none.gguf"], "none.gguf is no file"),
        (["o", "--imatrix", "x.gguf"], "--imatrix is for GGUFs"),
        (["o.gguf", "--join", "--imatrix", "x.gguf"], "say the type by --quantize"),
        (["o", "--keep-types"], "--keep-types is for GGUFs"),
    ],
)
def test_mistakes(floats: Path, tmp_path: Path, arguments: list[str], named: str) -> None:
    result = run(floats, tmp_path / arguments[0], *arguments[1:])
    assert result.exit_code == 1
    assert named in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_an_importance_matrix_of_another_model_is_refused(floats: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.gguf"
    imatrix.write(path, {"blk.0.x.weight": np.ones((1, 4))}, {"blk.0.x.weight": np.ones(1)}, [], 1)
    for source in (floats, "demo"):
        result = run(source, tmp_path / "o.gguf", "--quantize", "Q4_0", "--imatrix", path)
        assert result.exit_code == 1
        assert "has no tensor of this model" in result.stderr
    assert not (tmp_path / "o.gguf").exists()
