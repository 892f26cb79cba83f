"""Folders that MLX quantized, as GGUFs: the same weights where a GGUF has a type for them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType, LlamaFileType
from mlx_lm.convert import convert
from mlx_lm.utils import load_model

from convert.base.errors import UserError
from convert.gguf import file as gguf_file
from convert.gguf.file import GgufSource
from convert.gguf_to_mlx import layout, write_folder
from convert.gguf_to_mlx.values import values_of
from convert.mlx.safetensors_files import TensorFiles
from convert.mlx_to_gguf import write_gguf
from tests.support import published, tiny, tiny_gguf
from tests.support.agreement import disagreement
from tests.support.gguf_recipes import RECIPES

_Q = GGMLQuantizationType

SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 128}
FORMS = {
    (4, 64, "affine"): "Q4_1",
    (4, 32, "affine"): "Q4_1",
    (3, 128, "affine"): "Q4_1",
    (2, 64, "affine"): "Q4_1",
    (5, 64, "affine"): "Q5_1",
    (6, 64, "affine"): "F16",
    (8, 64, "affine"): "F16",
    (4, 32, "mxfp4"): "MXFP4",
    (8, 32, "mxfp8"): "F16",
    (4, 16, "nvfp4"): "F16",
}


def _quantized(folder: Path, arch: str, bits: int, group: int, mode: str) -> Path:
    more = {"moe_intermediate_size": 128} if "moe" in arch else {}
    tiny.write_model(folder / "float", arch, "bfloat16", "native", **SIZES, **more)
    out = folder / "quantized"
    convert(
        str(folder / "float"), str(out), quantize=True, q_bits=bits, q_group_size=group, q_mode=mode
    )
    return out


def _exact(module: Any) -> np.ndarray:
    """A module's weights in float32, from scales in float32."""
    if not hasattr(module, "scales"):
        return np.array(module.weight.astype(mx.float32))
    biases = getattr(module, "biases", None)
    scales = module.scales
    if biases is not None:
        scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    return np.array(mx.dequantize(module.weight, scales, biases, **settings, dtype=mx.float32))


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_weights_are_kept_where_a_gguf_has_their_type(
    arch: str, form: tuple[int, int, str], tmp_path: Path
) -> None:
    folder = _quantized(tmp_path, arch, *form)
    report = write_gguf(folder, tmp_path / "model.gguf")
    wanted = FORMS[form]
    # llama.cpp wants routers in float32.
    matrices = {name: kind for name, kind in report.types.items() if name in report.forms}
    assert {kind for name, kind in matrices.items() if "gate_inp" not in name} == {wanted}
    assert {kind for name, kind in matrices.items() if "gate_inp" in name} <= {"F32"}
    how = "rounded to" if wanted == "F16" else "kept as"
    assert f"{how} {wanted}" in Counter(report.forms.values()).most_common(1)[0][0]
    written = LlamaFileType(gguf_file.metadata(report.path)["general.file_type"]).name
    assert written.startswith(f"MOSTLY_{wanted}")
    model, _ = load_model(folder)
    modules = dict(model.named_modules())
    with GgufSource(report.path) as source:
        for path, weight in layout(source).weights.items():
            if path.endswith(".weight"):
                exact = _exact(modules[path.removesuffix(".weight")])
                values = values_of(source, weight)
                step = 2**-11 if wanted == "F16" else 0.0
                np.testing.assert_allclose(values, exact.reshape(values.shape), rtol=step)


@pytest.mark.parametrize("form", [(4, 64, "affine"), (5, 64, "affine"), (4, 32, "mxfp4")], ids=str)
def test_llama_cpp_answers_as_mlx_lm_does(form: tuple[int, int, str], tmp_path: Path) -> None:
    folder = _quantized(tmp_path, "qwen3", *form)
    report = write_gguf(folder, tmp_path / "model.gguf")
    model, _ = load_model(folder)
    model.set_dtype(mx.float32)
    # llama.cpp rounds activations to 8 bits beside quantized weights.
    assert disagreement(model, report.path, [5, 77, 301, 12, 88], near=0.3, n=8) < 0.3


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "MXFP4"])
@pytest.mark.parametrize(
    "name", ["llama", "gpt-oss", "qwen35moe", "deepseek v3", "gemma4, experts", "granitemoe"]
)
def test_a_quantized_gguf_comes_back_byte_for_byte(name: str, kind: str, tmp_path: Path) -> None:
    first = tiny_gguf.write(tmp_path / "first.gguf", RECIPES[name], _Q[kind])
    with GgufSource(first) as source:
        write_folder(source, tmp_path / "folder")
    report = write_gguf(tmp_path / "folder", tmp_path / "second.gguf")
    kept = 0
    with GgufSource(first) as old, GgufSource(report.path) as new:
        for tensor, entry in old.tensors.items():
            # Columns of MXFP4 are not reordered on the way to the folder, but decoded.
            if entry.type.name == kind and not (kind == "MXFP4" and "ssm_out" in tensor):
                assert new.tensor(tensor).type.name == kind, tensor
                assert new.raw(tensor).tobytes() == old.raw(tensor).tobytes(), tensor
                kept += 1
    assert kept > 8


def test_gpt_oss_of_its_publisher_keeps_its_blocks(tmp_path: Path) -> None:
    """Blocks and scales as OpenAI stores them, gates and ups by turns."""
    folder = published.write(tmp_path / "model", "gpt-oss")
    first = tiny_gguf.write(tmp_path / "first.gguf", RECIPES["gpt-oss"], _Q.MXFP4)
    weights = mx.load(str(folder / "model.safetensors"))
    with GgufSource(first) as source:
        for layer in range(4):
            at = f"model.layers.{layer}.mlp.experts"
            raw = {
                part: source.raw(f"blk.{layer}.ffn_{part}_exps.weight").reshape(4, 256, 8, 17)
                for part in ("gate", "up", "down")
            }
            both = np.stack((raw["gate"], raw["up"]), axis=2).reshape(4, 512, 8, 17)
            for name, blocks in (("gate_up_proj", both), ("down_proj", raw["down"])):
                low, high = blocks[..., 1:] & 15, blocks[..., 1:] >> 4
                codes = np.concatenate((low, high), axis=-1)
                del weights[f"{at}.{name}"]
                weights[f"{at}.{name}_blocks"] = mx.array(codes[..., ::2] | codes[..., 1::2] << 4)
                weights[f"{at}.{name}_scales"] = mx.array(np.ascontiguousarray(blocks[..., 0]))
        mx.save_safetensors(str(folder / "model.safetensors"), weights)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "mxfp4"}
        (folder / "config.json").write_text(json.dumps(config))
        report = write_gguf(folder, tmp_path / "second.gguf", pre="qwen2")
        with GgufSource(report.path) as new:
            for name in report.forms:
                assert new.raw(name).tobytes() == source.raw(name).tobytes()
    assert Counter(report.forms.values()) == {"mxfp4, kept as MXFP4": 12}


def test_a_type_that_is_asked_for_wins(tmp_path: Path) -> None:
    folder = _quantized(tmp_path, "llama", 4, 64, "affine")
    report = write_gguf(folder, tmp_path / "model.gguf", file_type="Q8_0")
    assert set(report.types.values()) == {"F32", "Q8_0"}
    assert set(report.forms.values()) == {"4-bit, groups of 64, rounded to Q8_0"}


def test_scales_beyond_float16_are_rounded(tmp_path: Path) -> None:
    folder = _quantized(tmp_path, "llama", 4, 64, "affine")
    with TensorFiles(folder) as files:
        weights = {name: files.read(name) for name in files.names}
    name = "model.layers.1.mlp.up_proj.scales"
    weights[name] = weights[name] * 2**-24
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    report = write_gguf(folder, tmp_path / "model.gguf")
    assert report.types["blk.1.ffn_up.weight"] == "F16"
    assert report.types["blk.0.ffn_up.weight"] == "Q4_1"


def test_bits_must_be_known(tmp_path: Path) -> None:
    folder = _quantized(tmp_path, "llama", 4, 64, "affine")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization"], config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"quantized .*another form"):
        write_gguf(folder, tmp_path / "model.gguf")
