"""`apply` on folders: only the writers' bytes change, exactly; nothing is left behind."""

import hashlib
import json
import shutil

import mlx.core as mx
import mlx_lm
import mlx_lm.utils
import numpy as np
import pytest

from abl_mlx.choices import ApplyOptions
from abl_mlx.commands import measure_apply
from abl_mlx.models import from_gguf
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import find_writers
from abl_mlx.outputs import folder_outputs
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.mlx.safetensors_files import TensorFiles
from tests.models.test_models import as_transformers_5, broken
from tests.models.test_writers import component
from tests.support import tiny


@pytest.fixture
def direction(tmp_path):
    path = tmp_path / "direction.npy"
    np.save(path, np.random.default_rng(3).normal(size=64).astype(np.float32))
    return path


def unit(direction):
    r = np.load(direction).astype(np.float64)
    return r / np.linalg.norm(r)


def float64(files, name):
    return np.array(files.read(name).astype(mx.float32)).astype(np.float64)


def tree_hash(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


WRITER_NAMES = ("embed_tokens.weight", "o_proj.weight", "down_proj.weight")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "phi3", "qwen3_moe", "granite", "mistral"])
def test_only_the_writers_change_and_exactly(arch, dtype, tiny_folder, direction, tmp_path):
    source = tiny_folder(arch, dtype=dtype)
    before = tree_hash(source)
    record = measure_apply.apply(direction, str(source), [tmp_path / "out"], ApplyOptions())
    assert tree_hash(source) == before
    r = unit(direction)
    # Half a unit in the last place of a 16-bit float, relative to the largest value.
    rounding = {"float16": 2**-11, "bfloat16": 2**-8, "float32": 2**-22}[dtype]
    with TensorFiles(source) as old, TensorFiles(tmp_path / "out") as new:
        assert old.names == new.names
        for name in old.names:
            a, b = old.info(name), new.info(name)
            assert (a.dtype, a.shape, a.offset) == (b.dtype, b.shape, b.offset)
            if not name.endswith(WRITER_NAMES):
                assert bytes(old.bytes(name)) == bytes(new.bytes(name))
                continue
            w = float64(old, name)
            exact = w - np.outer(w @ r, r) if "embed" in name else w - np.outer(r, r @ w)
            error = np.abs(float64(new, name) - exact).max()
            assert error <= rounding * np.abs(exact).max()
            assert np.abs(w - exact).max() > 20 * error
    assert record["leak"]["total"] < {"float16": 2e-3, "bfloat16": 1e-2, "float32": 1e-6}[dtype]


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_the_written_model_has_no_component_and_loads_in_mlx_lm(
    arch, tiny_folder, direction, tmp_path
):
    source = tiny_folder(arch, dtype="float32")
    measure_apply.apply(direction, str(source), [tmp_path / "out"], ApplyOptions())
    r = mx.array(np.load(direction))[None]
    assert component(load(source), ["Hi", "Why is it so?"], r) > 1e-2
    assert component(load(tmp_path / "out"), ["Hi", "Why is it so?"], r) < 1e-5
    model, tokenizer = mlx_lm.load(str(tmp_path / "out"))
    mlx_lm.generate(model, tokenizer, "Hi", max_tokens=3)


def test_layers_strength_and_embedding_are_choices(tiny_folder, direction, tmp_path):
    source = tiny_folder("llama", dtype="float32")
    options = ApplyOptions.of(strength=0.5, layers=frozenset({1}), embedding=False)
    measure_apply.apply(direction, str(source), [tmp_path / "out"], options)
    r = unit(direction)
    with TensorFiles(source) as old, TensorFiles(tmp_path / "out") as new:
        for name in old.names:
            same = bytes(old.bytes(name)) == bytes(new.bytes(name))
            assert same != (".layers.1." in name and name.endswith(WRITER_NAMES))
            if not same:
                np.testing.assert_allclose(
                    r @ float64(new, name), 0.5 * (r @ float64(old, name)), atol=1e-5
                )


def test_biases_of_writers_are_edited(tmp_path, direction):
    source = tiny.write_model(
        tmp_path / "model", "llama", dtype="float32", attention_bias=True, mlp_bias=True
    )
    chat = load(source)
    assert {path.rsplit(".", 1)[1] for w in find_writers(chat) for path in w.parameters} == {
        "weight",
        "bias",
    }
    measure_apply.apply(direction, str(source), [tmp_path / "out"], ApplyOptions())
    with TensorFiles(source) as old, TensorFiles(tmp_path / "out") as new:
        for name in ("self_attn.o_proj.bias", "mlp.down_proj.bias"):
            name = f"model.layers.0.{name}"
            assert abs(float64(old, name) @ unit(direction)) > 1e-3
            assert abs(float64(new, name) @ unit(direction)) < 1e-6
    assert component(load(tmp_path / "out"), ["Hi"], mx.array(np.load(direction))[None]) < 1e-5


def shard(folder):
    """Split model.safetensors in two with an index, as large models come."""
    weights = mx.load(str(folder / "model.safetensors"))
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), 1):
        file = f"model-0000{number}-of-00002.safetensors"
        mx.save_safetensors(
            str(folder / file), {name: weights[name] for name in part}, {"format": "pt"}
        )
        index.update(dict.fromkeys(part, file))
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_shards_and_other_files_are_kept(tiny_folder, direction, tmp_path):
    source = broken(tiny_folder("qwen2"), tmp_path, shard)
    (source / "LICENSE").write_text("free")
    (source / "README.md").write_text("# The original")
    (source / "extra").mkdir()
    (source / "extra" / "notes.txt").write_text("kept")
    (source / "pytorch_model.bin").write_bytes(b"unedited weights")
    record = measure_apply.apply(direction, str(source), [tmp_path / "out"], ApplyOptions())
    old, new = tree_hash(source), tree_hash(tmp_path / "out")
    changed = {name for name in old if old[name] != new.get(name)}
    assert changed == {
        "README.md",
        "config.json",
        "pytorch_model.bin",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }
    assert set(new) - set(old) == {"abl.json", "README.source.md"}
    assert record["written"][0]["left_out"] == ["pytorch_model.bin"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "abliterated" in card
    assert "This is an edited model" in card
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["abl_mlx"]["direction_sha256"] == record["direction"]["sha256"]
    assert json.loads((tmp_path / "out" / "abl.json").read_text()) == record.json


def test_a_transformers_5_folder_becomes_one_that_mlx_lm_loads(tiny_folder, direction, tmp_path):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(as_transformers_5(config)))

    source = broken(tiny_folder("qwen3_moe"), tmp_path, change)
    with pytest.raises(TypeError):
        mlx_lm.load(str(source))
    measure_apply.apply(direction, str(source), [tmp_path / "out"], ApplyOptions())
    mlx_lm.load(str(tmp_path / "out"))


def test_several_outputs_or_none(tiny_folder, direction, tmp_path):
    """The second output cannot be kept, so the first does not appear either."""
    source = tiny_folder("llama")
    options = ApplyOptions.of(max_leak=1e-9)
    with pytest.raises(UserError, match="did not survive"):
        measure_apply.apply(direction, str(source), [tmp_path / "a", tmp_path / "b"], options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direction.npy"]


@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (SystemExit(143), SystemExit),
        (OSError(28, "No space left on device"), UserError),
    ],
)
@pytest.mark.parametrize(
    ("module", "moment"),
    [
        (folder_outputs, "measure_leak"),
        (measure_apply, "write_companions"),
        (folder_outputs, "rewrite_folder"),
    ],
)
def test_an_interruption_leaves_nothing(
    module, moment, error, seen, tiny_folder, direction, tmp_path, monkeypatch
):
    source = tiny_folder("llama")
    original = getattr(module, moment)

    def interrupted(*args, **kwargs):
        original(*args, **kwargs)
        raise error

    monkeypatch.setattr(module, moment, interrupted)
    with pytest.raises(seen):
        measure_apply.apply(
            direction, str(source), [tmp_path / "deep" / "er" / "out"], ApplyOptions()
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["direction.npy"]


def test_the_edit_is_exact_in_float32(tiny_folder, direction, tmp_path):
    source = tiny_folder("llama", dtype="float32")
    measure_apply.apply(direction, str(source), [tmp_path / "a"], ApplyOptions())
    with TensorFiles(tmp_path / "a") as files:
        name = "model.layers.0.mlp.down_proj.weight"
        assert np.abs(unit(direction) @ float64(files, name)).max() < 1e-6


def quantized(folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "gptq", "bits": 4}})
    )


def copied_head(folder):
    weights = mx.load(str(folder / "model.safetensors"))
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def test_sources_that_cannot_be_edited_in_place(tiny_folder, direction, tmp_path):
    source = broken(tiny_folder("llama"), tmp_path, quantized)
    with pytest.raises(UserError, match="quantized by gptq in another form"):
        measure_apply.apply(direction, str(source), [tmp_path / "out"], ApplyOptions())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("arch", ["qwen2", "granite", "gemma3_text"])
def test_a_stored_copy_of_a_tied_head_is_edited_as_the_embedding(
    arch, tiny_folder, direction, tmp_path
):
    source = broken(tiny_folder(arch), tmp_path, copied_head)
    config = json.loads((source / "config.json").read_text())
    config.pop("tie_word_embeddings", None)  # as Gemma's configs leave it out
    tied = {} if arch == "gemma3_text" else {"tie_word_embeddings": True}
    (source / "config.json").write_text(json.dumps({**config, **tied}))
    inspected = measure_apply.inspect(str(source))
    assert inspected["tied"]
    assert inspected["head_copies"] == ["lm_head.weight"]
    out, gguf = tmp_path / "out", tmp_path / "out.gguf"
    record = measure_apply.apply(
        direction, str(source), [out, gguf], ApplyOptions.of(keep_undo=False)
    )
    names = [name for name in record["written"][0]["leak"]["tensors"] if "lm_head" in name]
    assert names == ["lm_head.weight"]
    with TensorFiles(out) as files:
        head = float64(files, "lm_head.weight")
        assert np.array_equal(head, float64(files, "model.embed_tokens.weight"))
    assert np.abs(head @ unit(direction)).max() < 1e-3
    # The GGUF has one tensor for both, and the two outputs are one model.
    assert "lm_head.weight" not in record["written"][1]["leak"]["tensors"]
    with GgufSource(gguf) as file:
        assert "output.weight" not in file.tensors
        assert np.array_equal(file.values("token_embd.weight"), head.astype(np.float32))
    asked = mx.array([[1, 2, 3, 4]])
    ours = mlx_lm.load(str(out))[0](asked).astype(mx.float32)
    with GgufSource(gguf) as file:
        theirs = from_gguf.load(file)[0].model(asked)
    assert mx.abs(ours - theirs).max().item() < 0.05
    # Without the embedding, neither is touched.
    kept = tmp_path / "kept"
    measure_apply.apply(direction, str(source), [kept], ApplyOptions.of(embedding=False))
    with TensorFiles(kept) as files, TensorFiles(source) as before:
        assert files.bytes("lm_head.weight") == before.bytes("lm_head.weight")


def test_a_quantized_copy_of_a_head_is_edited_on_its_own_grid(tiny_folder, direction, tmp_path):
    source = broken(tiny_folder("gemma3_text"), tmp_path, copied_head)
    model, tokenizer, config = mlx_lm.utils.load(str(source), return_config=True)

    def bits(path, module):
        ok = hasattr(module, "to_quantized") and module.weight.shape[-1] % 32 == 0
        return ok and {"group_size": 32, "bits": 8 if "lm_head" in path else 4}

    model, config = mlx_lm.utils.quantize_model(model, config, 32, 4, quant_predicate=bits)
    packed = tmp_path / "packed"
    mlx_lm.utils.save(packed, source, model, tokenizer, config)
    out = tmp_path / "out"
    record = measure_apply.apply(direction, str(packed), [out], ApplyOptions())
    tensors = record["written"][0]["leak"]["tensors"]
    assert tensors["lm_head.weight"]["leak"] < 0.01
    sizes = []
    for folder in (packed, out):
        head = mlx_lm.load(str(folder))[0].lm_head
        assert head.bits == 8
        values = mx.dequantize(
            head.weight, head.scales, head.biases, group_size=32, bits=8, dtype=mx.float32
        )
        sizes.append(np.linalg.norm(np.array(values, np.float64) @ unit(direction)))
    assert sizes[1] < 0.02 * sizes[0]


def test_an_output_inside_the_source_is_refused(tiny_folder, direction, tmp_path):
    source = shutil.copytree(tiny_folder("llama"), tmp_path / "model")
    with pytest.raises(UserError, match="inside the source"):
        measure_apply.apply(direction, str(source), [source / "out"], ApplyOptions())
