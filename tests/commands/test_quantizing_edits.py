"""`apply` with --quantize and --imatrix: an edit and new types in one step."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from abl_mlx.choices import ApplyOptions
from abl_mlx.commands import conversion, measure_apply
from convert.base.errors import UserError
from convert.gguf import imatrix
from convert.gguf.file import GgufSource, metadata, tensor_types


@pytest.fixture(scope="module")
def importance(floats: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    random = np.random.default_rng(0)
    with GgufSource(floats) as opened:
        sums = {
            name: np.exp(1.5 * random.standard_normal((1, entry.shape[-1])))
            for name, entry in opened.tensors.items()
            if len(entry.shape) > 1
        }
    path = tmp_path_factory.mktemp("importance") / "importance.gguf"
    imatrix.write(path, sums, {name: np.ones(1) for name in sums}, ["noise"], 100)
    return path


Apply = Callable[..., Path]


@pytest.fixture
def applied(direction: Path, tmp_path: Path) -> Apply:
    def apply(source: Path | str, name: str, **flags: object) -> Path:
        out = tmp_path / f"{name}.gguf"
        record = measure_apply.apply(direction, str(source), [out], ApplyOptions.of(**flags))
        assert record["leak"]["total"] < 1e-3 if not flags.get("plain_rounding") else True
        return out

    return apply


@pytest.mark.parametrize("file_type", ["Q4_K_M", "Q2_K", "IQ3_S"])
def test_an_edited_float_gguf_gets_the_types_that_were_asked_for(
    floats: Path, applied: Apply, tmp_path: Path, file_type: str
) -> None:
    out = applied(floats, "edited", quantize=file_type)
    plain = tmp_path / "plain.gguf"
    conversion.convert(str(floats), plain, quantize=file_type)
    edited = ("attn_output", "ffn_down", "token_embd")
    assert metadata(out)["general.file_type"] == metadata(plain)["general.file_type"]
    with GgufSource(out) as one, GgufSource(plain) as other:
        for name, entry in other.tensors.items():
            if any(part in name for part in edited):
                assert one.tensors[name].type == entry.type
                continue
            assert one.tensors[name].type == entry.type
            np.testing.assert_array_equal(one.raw(name), other.raw(name))


@pytest.mark.parametrize("source", ["folder", "gguf"])
@pytest.mark.parametrize("plain", [False, True])
def test_importance_lowers_the_weighted_error_of_edited_tensors(
    floats: Path, importance: Path, applied: Apply, source: str, plain: bool
) -> None:
    model = "demo" if source == "folder" else floats
    exact = applied(model, "exact", quantize="F32")
    found = imatrix.read(importance)
    errors = []
    for weights in (None, importance):
        out = applied(
            model, f"with-{weights is None}", quantize="Q3_K_M", imatrix=weights, max_leak=2.0,
            plain_rounding=plain,
        )  # fmt: skip
        assert ("quantize.imatrix.file" in metadata(out)) == (weights is not None)
        with GgufSource(out) as one, GgufSource(exact) as other:
            error = 0.0
            for name, entry in one.tensors.items():
                columns = found.weights(name, entry.shape)
                if "ffn_down" in name and columns is not None:
                    error += float(
                        (np.square(one.values(name) - other.values(name)) * columns).sum()
                    )
        errors.append(error)
    assert 0 < errors[1] < 0.9 * errors[0]


def test_types_that_are_quantized_stay_on_demand(
    floats: Path, applied: Apply, tmp_path: Path
) -> None:
    eight = tmp_path / "eight.gguf"
    conversion.convert(str(floats), eight, quantize="Q8_0")
    kept = applied(eight, "kept", quantize="Q4_K_M", keep_types=True)
    assert tensor_types(kept) == tensor_types(eight)
    lower = applied(eight, "lower", quantize="Q4_K_M")
    assert "Q4_K" in {kind.name for kind in tensor_types(lower).values()}


def test_a_quantized_gguf_keeps_its_types_with_an_importance_matrix(
    floats: Path, importance: Path, applied: Apply, tmp_path: Path
) -> None:
    four = tmp_path / "four.gguf"
    conversion.convert(str(floats), four, quantize="Q4_K_M", imatrix=importance)
    out = applied(four, "out", imatrix=importance)
    assert tensor_types(out) == tensor_types(four)
    assert metadata(out)["quantize.imatrix.dataset"] == "noise"


def test_a_folder_is_quantized_for_an_importance_matrix(direction: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="say the type by --quantize"):
        measure_apply.apply(
            direction, "demo", [tmp_path / "o.gguf"], ApplyOptions.of(imatrix=Path("x.gguf"))
        )


@pytest.mark.parametrize(
    ("output", "flags", "named"),
    [
        ("o.gguf", {"quantize": "Q9"}, "Q9 is not a supported"),
        ("o.gguf", {"keep_types": True}, "unless --quantize"),
        ("o", {"quantize": "Q8_0"}, "-o NAME.gguf"),
        ("o.lora.gguf", {"quantize": "Q8_0"}, "-o NAME.gguf"),
        ("o.gguf", {"quantize": "Q8_0", "keep_undo": True}, "Q8_0, whose rounding"),
        ("o.gguf", {"imatrix": Path("none.gguf")}, "none.gguf is no file"),
    ],
)
def test_mistakes(
    floats: Path, direction: Path, tmp_path: Path, output: str, flags: dict[str, object], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        measure_apply.apply(direction, str(floats), [tmp_path / output], ApplyOptions.of(**flags))
    assert list(tmp_path.iterdir()) == []
