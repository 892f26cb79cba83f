"""Loading: configs of transformers 5, broken folders, weights that are not numbers."""

import json
import shutil

import mlx.core as mx
import pytest

from abl_mlx import demo
from abl_mlx.inputs.sources import Source, resolve
from abl_mlx.models.chat_model import common_prefix, load
from abl_mlx.outputs.model_file import open_model
from convert.base.errors import UserError
from convert.base.hf_config import fill_in
from tests.support import tiny


def as_transformers_5(config):
    """The same config in the form in which transformers 5 saves it."""
    new = dict(config)
    theta = new.pop("rope_theta")
    local = new.pop("rope_local_base_freq", None)
    scaling = new.pop("rope_scaling", None) or {"rope_type": "default"}
    rope = {**scaling, "rope_theta": theta}
    if local is not None:
        rope = {
            "full_attention": rope,
            "sliding_attention": {"rope_type": "default", "rope_theta": local},
        }
    new["rope_parameters"] = rope
    if "num_experts" in new:
        new["num_local_experts"] = new.pop("num_experts")
    return new


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_transformers_5_folders_load_as_the_same_model(arch, tiny_folder, tmp_path):
    folder = tiny_folder(arch, rope_theta=54321.0)
    changed = tmp_path / "model"
    shutil.copytree(folder, changed)
    config = json.loads((folder / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(as_transformers_5(config)))
    old, new = load(folder), load(changed)
    tokens = mx.array([old.encode("How do I plan a garden?")])
    assert mx.array_equal(old.model(tokens), new.model(tokens)).item()


def test_mlx_lm_alone_refuses_or_misreads_such_a_folder(tiny_folder, tmp_path):
    """The test above can fail: without filling in, the MoE does not load at all."""
    import mlx_lm

    changed = tmp_path / "model"
    shutil.copytree(tiny_folder("qwen3_moe"), changed)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(as_transformers_5(config)))
    with pytest.raises(TypeError, match="num_experts"):
        mlx_lm.load(str(changed))


def test_fill_in_adds_and_never_changes():
    config = {
        "model_type": "x",
        "rope_theta": 1.0,
        "rope_parameters": {
            "rope_theta": 2.0,
            "rope_type": "llama3",
            "factor": 8.0,
            "partial_rotary_factor": 0.5,
        },
        "num_local_experts": 4,
    }
    filled = fill_in(config)
    assert filled["rope_theta"] == 1.0
    assert filled["num_experts"] == 4
    assert filled["partial_rotary_factor"] == 0.5
    assert filled["rope_scaling"] == {"rope_type": "llama3", "type": "llama3", "factor": 8.0}
    assert {key: filled[key] for key in config} == config
    assert "rope_scaling" not in fill_in({"rope_parameters": {"rope_type": "default"}})


def broken(folder, tmp_path, change):
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    change(copy)
    return copy


def without(*names):
    def change(folder):
        for name in names:
            (folder / name).unlink(missing_ok=True)

    return change


def no_template(folder):
    without("chat_template.jinja")(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config.pop("chat_template", None)
    path.write_text(json.dumps(config))


def with_config(**values):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **values}))

    return change


def with_nan(folder):
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.layers.1.mlp.down_proj.weight"][3, 4] = float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)


def cut(folder):
    raw = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(raw[: len(raw) // 2])


def garbled_config(folder):
    (folder / "config.json").write_text('{"model_type": ')


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config.json"), "no config.json"),
        (garbled_config, "not valid JSON"),
        (with_config(model_type=None), "model_type"),
        (with_config(model_type="nosuch"), "nosuch"),
        (with_config(num_hidden_layers=5), "could not be loaded"),
        (without("model.safetensors"), "model\\*.safetensors"),
        (without("tokenizer.json", "tokenizer_config.json", "tokenizer.model"), "tokenizer"),
        (no_template, "chat template"),
        (with_nan, "layers.1.mlp.down_proj.weight"),
        (cut, "model"),
    ],
)
def test_broken_folders_are_told_in_a_sentence(change, message, tiny_folder, tmp_path):
    folder = broken(tiny_folder("llama"), tmp_path, change)
    with pytest.raises(UserError, match=message):
        load(folder).encode("Why?")


def test_sources(tiny_folder, tmp_path):
    folder = tiny_folder("llama")
    assert resolve(str(folder)).path == folder
    assert resolve("demo").is_demo
    for text in (str(tmp_path / "nosuch"), "nosuch", "./a/b", "x.gguf", "ollama:llama3"):
        with pytest.raises(UserError):
            resolve(text)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        resolve(str(tmp_path / "file"))


def test_an_unreachable_hub_is_told_in_a_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="someone/nosuch-model"):
        resolve("someone/nosuch-model")


def test_common_prefix():
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == (1, 2)
    assert common_prefix([[1], [2]]) == ()
    assert common_prefix([[], [2]]) == ()


def test_a_tokenizer_prints_nothing_of_its_files(tiny_folder, tmp_path, capfd):
    """The tokenizers library prints unknown keys as they are, past Python."""
    folder = broken(tiny_folder("llama"), tmp_path, lambda copy: None)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "\x1b[31mred": 1}))
    load(folder)
    assert "\x1b" not in "".join(capfd.readouterr())


def test_a_tokenizer_without_a_model_is_not_the_demos(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": null}')
    assert not open_model(Source("x", tmp_path)).has_tokens(demo.vocabulary())
