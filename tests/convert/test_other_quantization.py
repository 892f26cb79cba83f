"""Folders that are quantized in another form than MLX's own: the advice given for them works."""

import json
import struct

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from convert.mlx.safetensors_files import TensorFiles
from tests.support import command, tiny


def f16(values):
    return "F16", values.shape, np.array(values.astype(mx.float16)).tobytes()


def save(path, tensors):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    body = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def zeros(dtype, *shape):
    return (
        dtype,
        shape,
        bytes(int(np.prod(shape)) * {"I32": 4, "F32": 4, "F16": 2, "I64": 8}.get(dtype, 1)),
    )


def fp8(name, o, i):
    return {name: ("F8_E4M3", (o, i), b"\x38" * (o * i)), f"{name}_scale_inv": zeros("F32", 1, 1)}


def bare_fp8(name, o, i):
    return {name: ("F8_E4M3", (o, i), b"\x38" * (o * i))}


def compressed(name, o, i):
    return {
        f"{name}_packed": zeros("I32", o, i // 8),
        f"{name}_scale": zeros("F16", o, i // 32),
        f"{name}_shape": zeros("I64", 2),
    }


def bnb4(name, o, i):
    return {
        name: zeros("U8", o * i // 2, 1),
        f"{name}.absmax": zeros("U8", o * i // 64),
        f"{name}.quant_map": zeros("F32", 16),
    }


def bnb8(name, o, i):
    return {name: zeros("I8", o, i), name.replace("weight", "SCB"): zeros("F32", o)}


def gptq(name, o, i):
    stem = name.removesuffix(".weight")
    return {
        f"{stem}.qweight": zeros("I32", i // 8, o),
        f"{stem}.qzeros": zeros("I32", i // 32, o // 8),
        f"{stem}.scales": zeros("F16", i // 32, o),
    }


def gptq_ordered(name, o, i):
    return gptq(name, o, i) | {f"{name.removesuffix('.weight')}.g_idx": zeros("I32", i)}


def awq(name, o, i):
    stem = name.removesuffix(".weight")
    codes = np.random.default_rng(o + i).integers(0, 2**31, (i, o // 8)).astype(np.int32)
    scales = np.full((i // 32, o), 0.01, np.float16)
    return {
        f"{stem}.qweight": ("I32", (i, o // 8), codes.tobytes()),
        f"{stem}.qzeros": zeros("I32", i // 32, o // 8),
        f"{stem}.scales": ("F16", (i // 32, o), scales.tobytes()),
    }


FORMS = {
    "fp8": (fp8, {"quant_method": "fp8", "weight_block_size": [128, 128]}),
    "fp8, bare": (bare_fp8, None),
    "compressed-tensors": (compressed, {"quant_method": "compressed-tensors",
                                        "format": "pack-quantized"}),
    "bitsandbytes, 4 bits": (bnb4, {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    "bitsandbytes, 8 bits": (bnb8, {"quant_method": "bitsandbytes", "load_in_8bit": True}),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "gptq with g_idx": (gptq_ordered, {"quant_method": "gptq", "bits": 4, "group_size": 32}),
    "gptq, unsaid": (gptq_ordered, None),
    "awq": (awq, {"quant_method": "awq", "bits": 4, "group_size": 32}),
}  # fmt: skip


def folder_of(form, tmp_path):
    pack, settings = FORMS[form]
    folder = tmp_path / "model"
    tiny.write_model(folder, "llama")
    file = folder / "model.safetensors"
    tensors = {}
    for name, values in mx.load(str(file)).items():
        quantized = values.ndim == 2 and "proj" in name
        tensors |= pack(name, *values.shape) if quantized else {name: f16(values)}
    save(file, tensors)
    config = json.loads((folder / "config.json").read_text())
    if settings is not None:
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


@pytest.fixture
def direction(tmp_path):
    path = tmp_path / "r.npy"
    np.save(path, np.random.default_rng(3).normal(size=64).astype(np.float32))
    return path


@pytest.mark.parametrize("form", FORMS)
def test_advice_for_another_form_of_quantization_works(form, direction, tmp_path):
    model, out = folder_of(form, tmp_path), tmp_path / "out"
    said = [
        command.fails("apply", direction, model, "-o", out),
        command.fails("convert", model, tmp_path / "out.gguf"),
    ]
    converted = tmp_path / "converted"
    if form == "awq":
        assert all("`mlx_lm.convert --hf-path" in one for one in said)
        mlx_lm.convert(str(model), mlx_path=str(converted))
        command.abl_mlx("apply", direction, converted, "-o", out)
        dequantized = tmp_path / "dequantized"
        mlx_lm.convert(str(model), mlx_path=str(dequantized), dequantize=True)
        command.abl_mlx("convert", dequantized, tmp_path / "out.gguf")
        return
    said += [
        command.fails("inspect", model),
        command.fails("apply", direction, model, "-o", "x.adapter"),
    ]
    for one in said:
        assert "take the float model it was made from" in one
        assert "mlx_lm.convert" not in one
    # And mlx-lm does not convert it: it fails, or takes bytes for numbers.
    if form == "fp8, bare":
        mlx_lm.convert(str(model), mlx_path=str(converted))
        with TensorFiles(converted) as files:
            assert files.info("model.layers.0.mlp.down_proj.weight").dtype == "U8"
    else:
        with pytest.raises(ValueError, match=r"not in model|g_idx|supported|Expected shape"):
            mlx_lm.convert(str(model), mlx_path=str(converted))
