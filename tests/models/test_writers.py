"""Writers are found by what the forward pass does, and editing them empties the direction."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from abl_mlx.edits.edit import Edit, target
from abl_mlx.edits.steering import ablation
from abl_mlx.models import capture
from abl_mlx.models.chat_model import ChatModel, load, load_lazily, skeleton
from abl_mlx.models.writers import find_writers
from convert.base.errors import UserError
from convert.mlx import packed, packed_modules
from tests.support import tiny

POST_NORM = {"gemma2", "gemma3_text", "olmo2"}


def random_direction(width, seed=0):
    return mx.random.normal((1, width), key=mx.random.key(seed))


def edit_in_place(writers, edit):
    for writer in edit.chosen(writers):
        for path in writer.parameters:
            name = path.rsplit(".", 1)[1]
            writer.module[name] = target(edit, writer, name, writer.module[name])


def component(chat, prompts, direction):
    """The largest |r·h| / |h| over layers, prompts and the last five positions, in float64."""
    states = capture.full(chat, [chat.encode(p) for p in prompts], range(-5, 0))
    states = np.array(states).astype(np.float64)
    r = np.array(direction[0]).astype(np.float64)
    return np.max(np.abs(states @ (r / np.linalg.norm(r))) / np.linalg.norm(states, axis=-1))


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_every_writer_is_found(arch, tiny_folder):
    chat = load(tiny_folder(arch))
    writers = find_writers(chat)
    mlp = "mlp.switch_mlp.down_proj" if arch == "qwen3_moe" else "mlp.down_proj"
    expected = {"model.embed_tokens"}
    for layer in range(len(chat.layers)):
        expected |= {f"model.layers.{layer}.self_attn.o_proj", f"model.layers.{layer}.{mlp}"}
    assert {writer.path for writer in writers} == expected
    for writer in writers:
        assert (writer.gain is not None) == (arch in POST_NORM and writer.kind != "embedding")
        if writer.kind == "embedding":
            assert writer.tied == chat.config["tie_word_embeddings"]


@pytest.mark.parametrize("arch", sorted(POST_NORM))
def test_gain_is_the_post_norms(arch, tiny_folder):
    """The probed gain is the norm's weight (plus one for Gemma) up to a factor."""
    chat = load(tiny_folder(arch))
    for writer in find_writers(chat)[1:]:
        layer = chat.layers[writer.layer]
        name = {
            "o_proj": "post_attention_layernorm",
            "down_proj": "post_feedforward_layernorm",
        }[writer.path.rsplit(".", 1)[1]]
        weight = np.array(getattr(layer, name).weight, dtype=np.float64)
        gain = weight + 1 if arch.startswith("gemma") else weight
        found = np.array(writer.gain, dtype=np.float64)
        np.testing.assert_allclose(
            found / np.linalg.norm(found), gain / np.linalg.norm(gain), atol=1e-5
        )


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_editing_all_writers_empties_the_direction(arch, tiny_folder):
    chat = load(tiny_folder(arch))
    direction = random_direction(chat.width)
    prompts = ["Hi", "How do I plan a garden?"]
    before = component(chat, prompts, direction)
    edit_in_place(find_writers(chat), Edit(direction))
    assert before > 1e-2
    assert component(chat, prompts, direction) < 1e-5


@pytest.mark.parametrize("arch", sorted(POST_NORM))
def test_ignoring_the_gain_would_leave_a_component(arch, tiny_folder):
    """The test above can fail: plain projection is not enough behind a norm."""
    chat = load(tiny_folder(arch))
    direction = random_direction(chat.width)
    r = direction[0] / mx.linalg.norm(direction[0], stream=mx.cpu)
    for writer in find_writers(chat):
        weight = writer.module["weight"]
        if writer.kind == "embedding":
            writer.module["weight"] = weight - mx.outer(weight @ r, r)
        else:
            writer.module["weight"] = weight - mx.outer(r, r @ weight)
    assert component(chat, ["How do I plan a garden?"], direction) > 1e-3


@pytest.mark.parametrize("strength", [1.0, 0.6, -0.5])
@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_runtime_ablation_equals_the_weight_edit(arch, strength, tiny_folder):
    chat = load(tiny_folder(arch))
    writers = find_writers(chat)
    directions = mx.concatenate([random_direction(chat.width, seed) for seed in (1, 2)])
    edit = Edit(directions, strength)
    tokens = mx.array([chat.encode("How do I plan a garden?")])
    plain = chat.model(tokens)
    with ablation(writers, edit):
        ablated = chat.model(tokens)
        mx.eval(ablated)
    after = chat.model(tokens)
    np.testing.assert_array_equal(np.array(after), np.array(plain))
    edit_in_place(writers, edit)
    edited = np.array(chat.model(tokens))
    scale = np.abs(edited).max()
    np.testing.assert_allclose(np.array(ablated) / scale, edited / scale, atol=2e-5)
    assert np.abs(np.array(plain) - edited).max() > 1e-2 * scale


def test_probing_restores_weights_and_classes(tiny_folder):
    chat = load(tiny_folder("gemma2"))
    chat.model.set_dtype(mx.bfloat16)
    before = {id(module): type(module) for module in chat.model.modules()}
    weights = {id(v) for _, v in nn.utils.tree_flatten(chat.model.parameters())}
    find_writers(chat)
    assert {id(module): type(module) for module in chat.model.modules()} == before
    assert {id(v) for _, v in nn.utils.tree_flatten(chat.model.parameters())} == weights


def same(found, expected):
    """Whether two lists of writers say the same of the same model."""
    assert [(w.path, w.kind, w.layer, w.has_bias, w.tied) for w in found] == [
        (w.path, w.kind, w.layer, w.has_bias, w.tied) for w in expected
    ]
    for one, other in zip(found, expected, strict=True):
        assert (one.gain is None) == (other.gain is None)
        if one.gain is not None:
            np.testing.assert_allclose(np.array(one.gain), np.array(other.gain), atol=1e-6)
    return True


@pytest.mark.parametrize(
    ("bits", "group", "mode"),
    [(4, 32, "affine"), (2, 64, "affine"), (4, 32, "mxfp4"), (8, 32, "mxfp8"), (4, 16, "nvfp4")],
)
@pytest.mark.parametrize("arch", ["gemma2", "qwen3_moe"])
def test_quantized_models_have_the_same_writers(arch, bits, group, mode, tiny_folder):
    chat = load_lazily(tiny_folder(arch))
    expected = find_writers(chat)
    nn.quantize(chat.model, group, bits, mode=mode)
    found = find_writers(chat)
    assert same(found, expected)
    kinds = {type(writer.module).__name__ for writer in found}
    experts = {"QuantizedSwitchLinear"} if arch == "qwen3_moe" else set()
    assert kinds == {"QuantizedLinear", "QuantizedEmbedding"} | experts


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_writers_are_found_in_files_without_reading_matrices(arch, tiny_folder):
    expected = find_writers(load(tiny_folder(arch)))
    before = mx.get_active_memory()
    chat = load_lazily(tiny_folder(arch))
    weights = sum(value.nbytes for _, value in nn.utils.tree_flatten(chat.model.parameters()))
    found = find_writers(chat)
    assert same(found, expected)
    assert mx.get_active_memory() - before < weights / 20


def test_probing_leaves_compiling_off_where_it_is(tiny_folder, monkeypatch):
    """Whoever sets MLX_DISABLE_COMPILE may have no compiler."""
    monkeypatch.setenv("MLX_DISABLE_COMPILE", "1")
    calls = []
    twice = mx.compile(lambda x: calls.append(1) or 2 * x)
    find_writers(load(tiny_folder("llama")))
    for _ in range(2):
        twice(mx.ones(3))
    assert len(calls) == 2  # a compiled function is called once, to be traced


def test_matrices_held_for_numpy_are_not_multiplied(tiny_folder, monkeypatch):
    """These compute when they are called, unlike MLX's own, so they must not be."""
    chat = load(tiny_folder("qwen3_moe"))
    packed_modules.hold(chat.model)
    expected = find_writers(load_lazily(tiny_folder("qwen3_moe")))
    for kind in (packed.PackedLinear, packed.PackedEmbedding, packed_modules.PackedSwitchLinear):
        monkeypatch.setattr(kind, "__call__", None)
    assert same(find_writers(chat), expected)


def test_a_model_of_8b_is_probed_without_its_weights():
    """At its real size: 16 GB of weights that nobody reads, in a few seconds."""
    config = tiny.config("llama") | {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    }
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    writers = find_writers(ChatModel(Path("8b"), skeleton(config), None, config))
    assert len(writers) == 65
    assert mx.get_peak_memory() - before < 200e6


class _Loud(nn.Module):
    """A layer that adds something which no weight of a linear explains."""

    def __init__(self, inner, extra):
        super().__init__()
        self.inner, self.extra, self.use_sliding = inner, extra, False

    def __call__(self, x, *args, **kwargs):
        return self.extra(x, self.inner(x, *args, **kwargs))


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        (lambda x, y: y + mx.sin(x), "something other than its linear weights"),
        (lambda x, y: y + 0.5 * mx.roll(y - x, 1, axis=-1), "more than a gain"),
        (
            lambda x, y: x + mx.sigmoid(x) * (y - x),
            "more than a gain",
        ),  # differs from token to token
    ],
)
def test_layers_that_a_rank_one_edit_cannot_reach_are_refused(extra, reason, tiny_folder):
    chat = load(tiny_folder("llama"))
    chat.model.model.layers[1] = _Loud(chat.model.model.layers[1], extra)
    with pytest.raises(UserError, match=reason):
        find_writers(chat)
