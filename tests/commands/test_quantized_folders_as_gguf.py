"""An edit of a folder that MLX quantized, written as a GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx_lm
import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors.numpy import load_file

from abl_mlx.choices import ApplyOptions
from abl_mlx.commands import conversion, measure_apply
from abl_mlx.demo import MODEL_PATH
from convert.base.errors import UserError
from convert.gguf.file import GgufSource, metadata
from tests.support import command, tiny

WRITERS = {
    "token_embd.weight",
    *(f"blk.{i}.{one}.weight" for i in range(4) for one in ("attn_output", "ffn_down")),
}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``quantized(bits, group, mode)``: the demo quantized by mlx-lm."""

    def folder(bits: int, group: int = 64, mode: str = "affine") -> Path:
        out = tmp_path_factory.mktemp("quantized") / f"demo-{bits}-{mode}"
        mlx_lm.convert(
            str(MODEL_PATH), str(out), quantize=True, q_bits=bits, q_group_size=group, q_mode=mode
        )
        return out

    return folder


def values(path: Path) -> dict[str, np.ndarray]:
    """Every tensor, float64, as gguf-py reads it."""
    return {
        one.name: dequantize(one.data, one.tensor_type).astype(np.float64)
        for one in GGUFReader(path).tensors
    }


def left(direction: Path, before: Path, after: Path, writers: set[str]) -> float:
    """The share of the direction's component that is left in the writers."""
    r = load_file(direction)["selected"].astype(np.float64).reshape(1, -1)
    r /= np.linalg.norm(r)
    old, new = values(before), values(after)
    parts = []
    for one in (old, new):
        along = [r @ one[n] if n.startswith("blk") else one[n] @ r.T for n in sorted(writers)]
        parts.append(np.linalg.norm(np.concatenate([part.ravel() for part in along])))
    return float(parts[1] / parts[0])


@pytest.mark.parametrize(
    ("form", "wanted"),
    [((4, 64), "Q4_1"), ((2, 32), "Q4_1"), ((4, 32, "mxfp4"), "MXFP4"), ((6, 64), "F16")],
    ids=str,
)
def test_unedited_weights_are_kept_and_edited_ones_hold_the_edit(
    quantized: Any, direction: Path, tmp_path: Path, form: tuple[Any, ...], wanted: str
) -> None:
    source, plain, out = quantized(*form), tmp_path / "plain.gguf", tmp_path / "out.gguf"
    conversion.convert(str(source), plain)
    record = measure_apply.apply(direction, str(source), [out], ApplyOptions())
    assert record["leak"]["total"] < 2e-4
    assert record["written"][0]["types"] == [wanted]
    assert f"matrices {form[0]}-bit" in record["written"][0]["note"] or wanted == "MXFP4"
    assert left(direction, plain, out, WRITERS) < 2e-4
    with GgufSource(plain) as one, GgufSource(out) as other:
        assert {name: entry.type for name, entry in one.tensors.items()} == {
            name: entry.type for name, entry in other.tensors.items()
        }
        for name in one.tensors:
            assert np.array_equal(one.raw(name), other.raw(name)) == (name not in WRITERS), name


def test_other_types_on_demand(quantized: Any, direction: Path, tmp_path: Path) -> None:
    source = quantized(4)
    plain, kept = tmp_path / "plain.gguf", tmp_path / "kept.gguf"
    conversion.convert(str(source), plain, quantize="Q6_K", keep_types=True)
    new = tmp_path / "new.gguf"
    options = ApplyOptions.of(quantize="Q6_K", keep_types=True)
    record = measure_apply.apply(direction, str(source), [kept], options)
    assert record["written"][0]["types"] == ["Q4_1"]
    with GgufSource(plain) as one, GgufSource(kept) as other:
        untouched = set(one.tensors) - WRITERS
        assert all(np.array_equal(one.raw(name), other.raw(name)) for name in untouched)
    record = measure_apply.apply(direction, str(source), [new], ApplyOptions.of(quantize="Q6_K"))
    assert set(record["written"][0]["types"]) <= {"Q6_K", "Q8_0"}
    assert left(direction, plain, new, WRITERS) < 2e-4
    assert metadata(new)["general.file_type"] == 18


def test_plain_rounding_loses_the_edit(quantized: Any, direction: Path, tmp_path: Path) -> None:
    source, out = quantized(2, 32), tmp_path / "out.gguf"
    with pytest.raises(UserError, match="did not survive"):
        measure_apply.apply(direction, str(source), [out], ApplyOptions.of(plain_rounding=True))
    assert list(tmp_path.iterdir()) == []


def test_experts_of_a_quantized_folder(direction: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 256, "moe_intermediate_size": 128, "intermediate_size": 128}
    tiny.write_model(tmp_path / "float", "qwen3_moe", "bfloat16", "native", **sizes)
    source, plain, out = tmp_path / "model", tmp_path / "plain.gguf", tmp_path / "out.gguf"
    mlx_lm.convert(str(tmp_path / "float"), str(source), quantize=True, q_group_size=32)
    conversion.convert(str(source), plain)
    record = measure_apply.apply(direction, str(source), [out], ApplyOptions())
    assert record["leak"]["total"] < 1e-3
    with GgufSource(plain) as one, GgufSource(out) as other:
        changed = {
            name for name in one.tensors if not np.array_equal(one.raw(name), other.raw(name))
        }
        assert {name.split(".")[-2] for name in changed} == {
            "token_embd", "attn_output", "ffn_down_exps"
        }  # fmt: skip
        assert other.tensors["blk.0.ffn_down_exps.weight"].type.name == "Q4_1"


def test_a_run_asks_the_gguf_of_a_quantized_folder(quantized: Any, tmp_path: Path) -> None:
    out = tmp_path / "out.gguf"
    record = command.abl_mlx("run", quantized(4), "-o", out)
    (written,) = record["evaluations"]
    assert written["runtime"] == "llama.cpp"
    assert record["before"]["harmful_refusal_rate"] >= 0.9
    assert written["after"]["harmful_refusal_rate"] <= 0.05
    assert written["component"] < 0.01
    assert written["leak"]["total"] < 2e-4


def test_flags_that_do_not_fit(quantized: Any, direction: Path, tmp_path: Path) -> None:
    source, out = quantized(4), tmp_path / "out.gguf"
    said = command.fails("apply", direction, source, "-o", out, "--writer-bits", "8")
    assert "out.gguf gets its types by --quantize" in said
    assert "unless --quantize is given" in command.fails(
        "apply", direction, source, "-o", out, "--keep-types"
    )
    assert list(tmp_path.iterdir()) == []
