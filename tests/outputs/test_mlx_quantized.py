"""Quantized MLX folders: every mode to the bit, edits that survive, folders that mlx-lm loads."""

import json
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model, quantize_model

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.choices import ApplyOptions, MeasureOptions
from abl_mlx.commands import measure_apply
from abl_mlx.demo import MODEL_PATH
from abl_mlx.edits import rounding, slabs
from abl_mlx.edits.edit import Edit
from abl_mlx.inputs import prompts
from abl_mlx.models import chat_model
from abl_mlx.models.writers import Writer, find_writers
from abl_mlx.outputs import folder as model_folder
from abl_mlx.outputs import folder_quantized
from convert.base.errors import UserError
from convert.mlx.grids import MlxCodec, Quantization, Rows
from convert.mlx.matrix import find_matrix
from convert.mlx.safetensors_files import TensorFiles
from tests.support import tiny

AFFINE = [Quantization(bits, group) for bits in (2, 3, 4, 5, 6, 8) for group in (32, 64, 128)]
OTHERS = [Quantization(4, 32, "mxfp4"), Quantization(8, 32, "mxfp8"), Quantization(4, 16, "nvfp4")]
FLOATS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def scales_type(mode):
    return "BF16" if mode.mode == "affine" else "U8"


def raw(array):
    return np.array(array.view(mx.uint8)).reshape(array.shape[0], -1)


def mlx_quantized(values, mode, dtype, global_scale=None):
    """Rows and float32 values by MLX itself."""
    more = {} if global_scale is None else {"global_scale": mx.array(global_scale, mx.float32)}
    settings = {"group_size": mode.group_size, "bits": mode.bits, "mode": mode.mode, **more}
    packed, *rest = mx.quantize(mx.array(values).astype(FLOATS.get(dtype, mx.float32)), **settings)
    wide = [part.astype(mx.float32) if mode.mode == "affine" else part for part in rest]
    back = mx.dequantize(packed, *wide, **settings, dtype=mx.float32)
    each = None if global_scale is None else np.full(len(values), global_scale, np.float32)
    biases = raw(rest[1]) if len(rest) > 1 else None
    return Rows(raw(packed), raw(rest[0]), biases, each), np.array(back.astype(mx.float32))


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "U8"])
@pytest.mark.parametrize("mode", [*AFFINE, *OTHERS], ids=str)
def test_every_mode_is_read_and_written_to_the_bit(mode, dtype):
    if (dtype == "U8") != (mode.mode != "affine"):
        pytest.skip("scales that the mode does not have")
    rng = np.random.default_rng(0)
    values = rng.normal(size=(24, 256)) * np.exp(2 * rng.normal(size=(24, 1)))
    values[0], values[1, :128] = 0, 3
    values = values.astype(np.float32)
    codec = MlxCodec(mode, dtype)
    for scale in (None, 7.7, 0.0123) if mode.mode == "nvfp4" else (None,):
        rows, expected = mlx_quantized(values, mode, dtype, scale)
        grid = codec.decode(rows)
        np.testing.assert_array_equal(grid.values(), expected)
        for old, new in zip(rows, codec.encode(grid), strict=True):
            assert (old is None and new is None) or np.array_equal(old, new)
        fresh = codec.fresh(values, rows.global_scale)
        if mode.mode != "affine":
            np.testing.assert_array_equal(fresh.frame.scales, rows.scales)
        elif dtype == "F32":
            assert np.array_equal(codec.encode(fresh).weight, rows.weight)


def test_all_codes_of_mxfp8_and_what_is_no_number():
    codes = np.arange(256, dtype=np.uint8).reshape(8, 32)
    codes[codes & 0x7F == 0x7F] = 0x80  # -0 in the place of NaN
    scales = np.array([[0], [1], [126], [127], [128], [140], [200], [120]], np.uint8)
    codec = MlxCodec(OTHERS[1], "U8")
    grid = codec.decode(Rows(codes, scales))
    expected = mx.dequantize(
        mx.array(codes.view(np.uint32)), mx.array(scales), group_size=32, bits=8, mode="mxfp8",
        dtype=mx.float32,
    )  # fmt: skip
    np.testing.assert_array_equal(grid.values(), np.array(expected.astype(mx.float32)))
    assert np.array_equal(codec.encode(grid).weight, codes)
    for nan in (0x7F, 0xFF):
        damaged = codes.copy()
        damaged[3, 5] = nan
        with pytest.raises(UserError, match="NaN"):
            codec.decode(Rows(damaged, scales))
    with pytest.raises(UserError, match="not finite"):
        codec.decode(Rows(codes, np.full_like(scales, 255)))


def case(mode, d, n, k, axis):
    """A quantized matrix in which a direction is k times as strong as a random one, edited."""
    rng = np.random.default_rng(d + k)
    u = rng.normal(size=(1, d))
    u /= np.linalg.norm(u)
    weights = 0.02 * (rng.normal(size=(d, n)) + u.T @ ((k - 1) * rng.normal(size=(1, n))))
    codec = MlxCodec(mode, scales_type(mode))
    own = codec.fresh(np.ascontiguousarray(weights.T if axis else weights, dtype=np.float32))
    own = own.with_codes(own.nearest(own.values()))
    source = own.values().astype(np.float64)
    taken = source @ u.T if axis else (u @ source).T
    target = (source - (taken @ u if axis else u.T @ taken.T)).astype(np.float32)
    length = float(np.sqrt(np.mean(taken**2)))
    edited = rounding.Edited(target, u.astype(np.float32), axis, length, taken.astype(np.float32))
    return codec, own, edited, u, taken


def leak(grid, edited, u, taken):
    error = grid.values().astype(np.float64) - edited.target
    left = error @ u.T if edited.axis else u @ error
    return np.linalg.norm(left) / np.linalg.norm(taken)


@pytest.mark.parametrize(("d", "n", "axis"), [(1024, 256, 0), (4096, 128, 0), (1024, 64, 1)])
@pytest.mark.parametrize("k", [1, 4, 10])
@pytest.mark.parametrize("mode", [*AFFINE, *OTHERS], ids=str)
def test_the_edit_survives_every_mode(mode, k, d, n, axis):
    codec, own, edited, u, taken = case(mode, d, n, k, axis)
    encoders = folder_quantized.encoders(codec, None)
    how = rounding.better_source(own, edited, encoders)
    rows = codec.encode(rounding.round_onto(own, edited, encoders, how))
    limit = 0.001 if mode.mode == "affine" else 0.005
    assert leak(codec.decode(rows), edited, u, taken) <= limit
    if k == 1 and mode.bits <= 4:
        assert leak(own.with_codes(own.nearest(edited.target)), edited, u, taken) > 0.5


def save(folder, values, mode, dtype):
    """A folder with one matrix; returns its weights, float64, as MLX dequantizes them.

    The header is of an odd length, so the words of the matrix are not aligned.
    """
    settings = {"group_size": mode.group_size, "bits": mode.bits, "mode": mode.mode}
    parts = mx.quantize(mx.array(values).astype(FLOATS.get(dtype, mx.float32)), **settings)
    names = ("m.weight", "m.scales", "m.biases")
    folder.mkdir()
    file = folder / "model.safetensors"
    mx.save_safetensors(str(file), dict(zip(names, parts, strict=False)))
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    end = 8 + length
    odd = length + 1 - length % 2
    head = odd.to_bytes(8, "little") + content[8:end] + b" " * (odd - length)
    file.write_bytes(head + content[end:])
    wide = [part.astype(mx.float32) if dtype != "U8" else part for part in parts[1:]]
    back = mx.dequantize(parts[0], *wide, **settings, dtype=mx.float32)
    return np.array(back.astype(mx.float32)).astype(np.float64)


READ = [(AFFINE[0], "F16"), (AFFINE[4], "BF16"), (AFFINE[7], "BF16"), (AFFINE[8], "F32"),
        (AFFINE[11], "F16"), (AFFINE[12], "BF16"), (AFFINE[16], "F32")]  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "embedding"])
@pytest.mark.parametrize(("mode", "dtype"), [*READ, *[(mode, "U8") for mode in OTHERS]], ids=str)
def test_the_leak_of_two_files_is_that_of_the_weights_that_mlx_reads(mode, dtype, kind, tmp_path):
    rng = np.random.default_rng(1)
    values = rng.normal(size=(600, 768)).astype(np.float32)
    shifted = values + 0.1 * rng.normal(size=values.shape).astype(np.float32)
    before = save(tmp_path / "before", values, mode, dtype)
    after = save(tmp_path / "after", shifted, mode, dtype)
    axis = -1 if kind == "embedding" else -2
    u = rng.normal(size=(1, values.shape[axis])).astype(np.float32)
    edit = Edit(mx.array(u), 0.7)
    u = u.astype(np.float64) / np.linalg.norm(u.astype(np.float64))
    writer = Writer("m", kind, 0, None, False, None)
    with TensorFiles(tmp_path / "before") as old, TensorFiles(tmp_path / "after") as new:
        assert old.info("m.weight").offset % 2
        matrix = find_matrix(old, "m.weight", values.shape[-1])
        one = folder_quantized.MatrixEdit(edit, writer, matrix, matrix)
        found = folder_quantized.compare(old, new, one)
    wanted = before - 0.7 * (before @ u.T @ u if axis == -1 else u.T @ (u @ before))

    def along(weights):
        return np.linalg.norm(weights @ u.T if axis == -1 else u @ weights)

    assert found.value == pytest.approx(along(after - wanted) / along(before - wanted), rel=1e-5)
    error = np.linalg.norm(after - wanted) / np.linalg.norm(wanted)
    assert found.error == pytest.approx(error, rel=1e-5)


# --- folders -----------------------------------------------------------------------------------


def quantize(source, out, predicate=None, **settings):
    """What `mlx_lm.convert -q` writes, with a quantization for each module if wanted."""
    model, config = load_model(source)
    model, config = quantize_model(
        model, config, settings.get("group_size"), settings.get("bits"),
        settings.get("mode", "affine"), settings.get("global_scale", False), predicate,
    )  # fmt: skip
    out.mkdir()
    for file in source.iterdir():
        if "safetensors" not in file.name and file.name != "config.json":
            (out / file.name).write_bytes(file.read_bytes())
    (out / "config.json").write_text(json.dumps(config))
    weights = dict(tree_flatten(model.parameters()))
    names = sorted(weights)
    index = {}
    for number in (0, 1):  # parts of a module lie in different shards
        file = f"model-0000{number + 1}-of-00002.safetensors"
        mx.save_safetensors(str(out / file), {n: weights[n] for n in names[number::2]})
        index.update(dict.fromkeys(names[number::2], file))
    total = sum(value.nbytes for value in weights.values())
    (out / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    )
    return out


@pytest.fixture
def direction(tmp_path):
    path = tmp_path / "direction.npy"
    np.save(path, np.random.default_rng(3).normal(size=256).astype(np.float32))
    return path


def component(folder, direction):
    """Largest |r·W| / |W| over the writers' weights, as mlx-lm's own loader has them."""
    r = np.load(direction).astype(np.float64)
    r /= np.linalg.norm(r)
    model, _ = load_model(folder)
    largest = 0.0
    for path, module in model.named_modules():
        if not path.endswith(("embed_tokens", "o_proj", "down_proj")) or "weight" not in module:
            continue
        values = module.weight.astype(mx.float32) if "scales" not in module else unpacked(module)
        values = np.array(values.astype(mx.float32)).astype(np.float64)
        along = values @ r if path.endswith("embed_tokens") else np.swapaxes(values, -1, -2) @ r
        largest = max(largest, float(np.linalg.norm(along) / np.linalg.norm(values)))
    return largest


def unpacked(module):
    biases = module.get("biases")
    scales = module.scales if biases is None else module.scales.astype(mx.float32)
    settings = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
    shared = getattr(module, "global_scale", None)
    if shared is not None:
        return mx.stack([
            mx.dequantize(module.weight[e], scales[e], **settings, global_scale=shared[e],
                          dtype=mx.float32)
            for e in range(len(shared))
        ])  # fmt: skip
    biases = biases if biases is None else biases.astype(mx.float32)
    return mx.dequantize(module.weight, scales, biases, **settings, dtype=mx.float32)


def mixed(path, module):
    if "down_proj" in path:
        return {"group_size": 64, "bits": 6, "mode": "affine"}
    if "embed" in path:
        return {"group_size": 32, "bits": 8, "mode": "mxfp8"}
    return "layers.0" not in path  # the first layer's other matrices stay floats


SETTINGS = {
    "4 bits": {"bits": 4, "group_size": 64},
    "mixed": {"bits": 3, "group_size": 32, "predicate": mixed},
    "mxfp4": {"mode": "mxfp4"},
    "nvfp4, global": {"mode": "nvfp4", "global_scale": True},
}


def probe_floats_instead(folder, monkeypatch):
    """Have writers found in the model before it was quantized: they are the same.

    MLX multiplies experts that have a global scale on a GPU alone, so they cannot be probed here.
    """
    writers = find_writers(chat_model.load(folder))
    monkeypatch.setattr(model_folder, "find_writers", lambda chat: writers)


@pytest.mark.parametrize("arch", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_written_folder_keeps_its_form(arch, name, direction, tmp_path, monkeypatch):
    wide = {**tiny.WIDE, "moe_intermediate_size": 128} if arch == "qwen3_moe" else tiny.WIDE
    source = tiny.write_model(tmp_path / "float", arch, dtype="bfloat16", **wide)
    source = quantize(source, tmp_path / "source", **SETTINGS[name])
    out = tmp_path / "out"
    # Slabs of a few columns or rows, as wide matrices are cut into.
    monkeypatch.setattr(slabs, "SLAB", 1 << 14)
    gpu_alone = "global" in name and arch == "qwen3_moe"
    if gpu_alone:
        probe_floats_instead(tmp_path / "float", monkeypatch)
    record = measure_apply.apply(direction, str(source), [out], ApplyOptions())
    assert record["leak"]["total"] < 1e-3
    if gpu_alone:
        with TensorFiles(source) as files:
            assert any(tensor.endswith("global_scale") for tensor in files.names)
    before, after = (json.loads((f / "config.json").read_text()) for f in (source, out))
    assert after.pop("abl_mlx")
    assert {key: after[key] for key in before} == before
    with TensorFiles(source) as old, TensorFiles(out) as new:
        assert old.names == new.names
        changed = set()
        for tensor in old.names:
            a, b = old.info(tensor), new.info(tensor)
            assert (a.dtype, a.shape, a.offset) == (b.dtype, b.shape, b.offset)
            if bytes(old.bytes(tensor)) != bytes(new.bytes(tensor)):
                changed.add(tensor.rsplit(".", 1)[0])
        assert all(one.endswith(("embed_tokens", "o_proj", "down_proj")) for one in changed)
        assert len(changed) == 1 + 2 * 3
    # The noise of a float tensor's own type is all that is left where the mixture has one.
    assert component(source, direction) > 0.03
    assert component(out, direction) < (1e-3 if name == "mixed" else 1e-4)
    model, tokenizer = mlx_lm.load(str(out))
    model.set_dtype(mx.float32)  # on a CPU, MLX multiplies stacks of float experts in no other
    if not gpu_alone:
        mlx_lm.generate(model, tokenizer, "Hi", max_tokens=2)


@pytest.mark.parametrize("bits", ["8", "bf16"])
@pytest.mark.parametrize("name", ["4 bits", "nvfp4, global"])
def test_writers_alone_are_promoted(bits, name, direction, tmp_path, monkeypatch):
    wide = {**tiny.WIDE, "moe_intermediate_size": 128}
    source = tiny.write_model(tmp_path / "float", "qwen3_moe", dtype="bfloat16", **wide)
    source = quantize(source, tmp_path / "source", **SETTINGS[name])
    out = tmp_path / "out"
    if "global" in name:
        probe_floats_instead(tmp_path / "float", monkeypatch)
    record = measure_apply.apply(direction, str(source), [out], ApplyOptions.of(writer_bits=bits))
    assert record["leak"]["total"] < 1e-3
    maps = [json.loads((f / "config.json").read_text())["quantization"] for f in (source, out)]
    added = {path: entry for path, entry in maps[1].items() if maps[0].get(path) != entry}
    assert len(added) == 1 + 2 * 3
    group = 64 if name == "4 bits" else 32
    entry = False if bits == "bf16" else {"group_size": group, "bits": 8, "mode": "affine"}
    assert all(one == entry for one in added.values())
    config = json.loads((out / "config.json").read_text())
    assert config["quantization_config"] == config["quantization"]
    index = json.loads((out / "model.safetensors.index.json").read_text())
    with TensorFiles(source) as old, TensorFiles(out) as new:
        assert index["metadata"]["total_size"] == sum(new.info(n).nbytes for n in new.names)
        for tensor in old.names:
            if tensor.rsplit(".", 1)[0] not in added:
                assert bytes(old.bytes(tensor)) == bytes(new.bytes(tensor))
        if bits == "bf16":
            assert not any(f"{path}.scales" in new for path in added)
    assert component(out, direction) < 1e-3
    mlx_lm.load(str(out))  # strict: nothing is missing, nothing superfluous


def test_what_cannot_be_promoted_or_fits_nothing_is_named(direction, tmp_path):
    source = tiny.write_model(tmp_path / "float", "llama", dtype="bfloat16", **tiny.WIDE)
    with pytest.raises(UserError, match="--writer-bits 8: nothing"):
        measure_apply.apply(
            direction, str(source), [tmp_path / "out"], ApplyOptions.of(writer_bits="8")
        )
    quantized = quantize(source, tmp_path / "source", bits=4, group_size=64)
    name = "model.layers.0.mlp.down_proj.weight"
    with TensorFiles(quantized) as files:
        assert find_matrix(files, name, 256).quantization == Quantization(4, 64)
        with pytest.raises(UserError, match=r"down_proj\.weight"):
            find_matrix(files, name, 512 + 32)
    options = ApplyOptions.of(plain_rounding=True)
    with pytest.raises(UserError, match="did not survive"):
        measure_apply.apply(direction, str(quantized), [tmp_path / "out"], options)
    assert not (tmp_path / "out").exists()


# --- behaviour ---------------------------------------------------------------------------------


def rates(folder, limit):
    """Refusals of locked and of allowed prompts."""
    chat, sets = chat_model.load(folder), prompts.load_demo()
    found = []
    for part in (sets.harmful.test, sets.harmless.test):
        replies = evaluate.in_mlx(chat)(part.take(limit).texts, 16)
        found.append(np.mean([classify(reply) is Verdict.REFUSAL for reply in replies]))
    return found


@pytest.mark.parametrize("bits", [4, pytest.param(3, marks=pytest.mark.slow), 2])
def test_the_quantized_demo_stops_refusing(bits, tmp_path):
    source = quantize(MODEL_PATH, tmp_path / "source", bits=bits, group_size=64)
    out = tmp_path / "out"
    found = tmp_path / "direction.safetensors"
    measure_apply.measure(str(source), found, MeasureOptions.of(layer=2, position=-1, limit=32))
    measure_apply.apply(found, str(source), [out], ApplyOptions())
    locked, allowed = rates(source, 32)
    assert locked >= 0.95
    assert allowed <= 0.05
    locked, allowed = rates(out, 32)
    assert locked <= 0.05
    assert allowed <= 0.05
    if bits == 2:  # mlx-lm's own command line
        text = prompts.load_demo().harmful.test.texts[0]
        done = subprocess.run(
            [sys.executable, "-m", "mlx_lm", "generate", "--model", str(out), "--prompt", text,
             "--max-tokens", "16", "--verbose", "False"],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert classify(done.stdout) is Verdict.ANSWER
