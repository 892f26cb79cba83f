"""The readers of the residual stream, found by probing, and what their edit does to a layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.edits.edit import Edit, target
from abl_mlx.edits.steering import ablation
from abl_mlx.models import from_gguf
from abl_mlx.models.chat_model import ChatModel, load
from abl_mlx.models.hooks import around
from abl_mlx.models.readers import find_readers, with_readers
from abl_mlx.models.writers import Writer, find_writers
from convert import gguf_to_mlx
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.mlx_to_gguf import write_gguf
from tests.models.test_writers import random_direction
from tests.support import zoo

# RMSNorm with w and with 1 + w, LayerNorm, no norm before the layer, fused and separate
# projections, attention beside the MLP, experts, latent attention, a state-space mixer.
ARCHITECTURES = [
    "llama", "gemma2", "qwen2", "phi3", "olmo2", "cohere", "gpt2", "phi", "stablelm", "qwen3_moe",
    "deepseek_v3", "dbrx", "gpt_oss", "mamba2", "qwen3_next", "gemma4_text",
]  # fmt: skip


def edit_weights(readers: list[Writer], edit: Edit) -> None:
    for reader in edit.chosen(readers):
        for parameter in ["weight", *(["bias"] if reader.has_bias else [])]:
            values = reader.module[parameter].astype(mx.float32)
            reader.module[parameter] = target(edit, reader, parameter, values)


def layer_calls(chat: ChatModel, tokens: mx.array) -> list[tuple[Any, ...]]:
    """(layer, its arguments, its named arguments) of one pass."""
    calls = []

    def keep(call: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((args, kwargs))
        return call(*args, **kwargs)

    with around([(layer, keep) for layer in chat.layers]):
        mx.eval(chat.model(tokens))
    return [(layer, *one) for layer, one in zip(chat.layers, calls, strict=True)]


def difference(layer: Any, args: Any, kwargs: Any, r: np.ndarray, centered: bool) -> float:
    """How differently a layer acts on a stream and on its mirror image, whose norm is the same.

    Norms inside the layer see the same scale too, if its writers write nothing along r.

    Of the outputs' difference, the part across r, relative to the output; in float64.
    """
    h = np.array(args[0]).astype(np.float64)
    across = r - r.mean() if centered else r
    seen = h - h.mean(axis=-1, keepdims=True) if centered else h
    mirrored = h - 2 * (seen @ across / (across @ across))[..., None] * r
    outputs = []
    for stream in (h, mirrored):
        one = layer(mx.array(stream.astype(np.float32)), *args[1:], **kwargs)
        one = one[0] if isinstance(one, tuple | list) else one
        outputs.append(np.array(one).astype(np.float64))
    change = outputs[1] - outputs[0]
    change -= (change @ r)[..., None] * r
    return float(np.abs(change).max() / np.abs(outputs[0]).max())


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_layers_cannot_tell_a_stream_from_its_mirror_image(arch: str) -> None:
    chat = zoo.chat(arch)
    tokens = mx.array([chat.encode("How do I plan a garden?")])
    calls = layer_calls(chat, tokens)
    readers = find_readers(chat)
    assert {one.layer for one in readers} == set(range(-1, len(chat.layers)))
    direction = random_direction(chat.width)
    if arch not in ("cohere", "phi"):  # whose layers have one norm, at their beginning
        direction = direction - direction.mean()
    edit_weights(find_writers(chat), Edit(direction))
    r = np.array(direction[0]).astype(np.float64)
    r /= np.linalg.norm(r)
    centered = readers[-1].centered
    before = max(difference(*call, r, centered) for call in calls)
    edit_weights(readers, Edit(direction, places="readers"))
    after = max(difference(*call, r, centered) for call in calls)
    assert before > 0.01
    assert after < 2e-5 < before / 100


def test_what_reads_is_named_with_its_norm() -> None:
    chat = zoo.chat("qwen3_moe")
    found = {one.path: one for one in find_readers(chat)}
    layer = "model.layers.0."
    assert {path.removeprefix(layer) for path in found if path.startswith(layer)} == {
        "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate",
        "mlp.switch_mlp.gate_proj", "mlp.switch_mlp.up_proj",
    }  # fmt: skip
    assert found[f"{layer}mlp.switch_mlp.up_proj"].kind == "expert-readers"
    assert found[f"{layer}mlp.gate"].component == "mlp"
    assert found[f"{layer}self_attn.v_proj"].component == "attention"
    for path, norm in (
        ("self_attn.q_proj", "input_layernorm"), ("mlp.gate", "post_attention_layernorm"),
    ):  # fmt: skip
        wanted = np.array(getattr(chat.layers[0], norm).weight)
        gain = np.array(found[layer + path].gain)
        np.testing.assert_allclose(gain, wanted / np.abs(wanted).max(), atol=1e-4)
    assert all(one.gain is None for one in find_readers(zoo.chat("olmo2")) if one.layer >= 0)
    assert all(one.centered for one in find_readers(zoo.chat("phi")))


@pytest.mark.parametrize(("arch", "kind"), [("llama", "reader"), ("gemma2", "embedding")])
def test_the_head_is_a_reader_behind_the_last_norm(arch: str, kind: str) -> None:
    chat = zoo.chat(arch)
    head = find_readers(chat)[0]
    assert (head.kind, head.layer, head.tied) == (kind, -1, kind == "embedding")
    norm = np.array(chat.model.model.norm.weight) + (arch == "gemma2")
    np.testing.assert_allclose(np.array(head.gain), norm / np.abs(norm).max(), atol=1e-4)


@pytest.mark.parametrize("arch", ["talkie", "gemma3n", "rwkv7", "longcat_flash"])
def test_layers_that_read_their_stream_in_other_ways_are_refused(arch: str) -> None:
    with pytest.raises(UserError, match=r"--edit readers: .*: edit the writers\."):
        find_readers(zoo.chat(arch))


@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi3", "qwen3_moe", "cohere"])
@pytest.mark.parametrize("strength", [1.0, 2.0])
def test_at_runtime_as_in_the_weights(arch: str, strength: float) -> None:
    chat = zoo.chat(arch)
    places = with_readers(chat, find_writers(chat), "readers")
    directions = mx.concatenate([random_direction(chat.width, seed) for seed in (1, 2)])
    edit = Edit(directions, strength, places="readers")
    tokens = mx.array([chat.encode("How do I plan a garden?")])
    with ablation(places, edit):
        at_runtime = np.array(chat.model(tokens))
    edit_weights(places, edit)
    edited = np.array(chat.model(tokens))
    assert np.abs(np.array(zoo.chat(arch).model(tokens)) - edited).max() > 1e-2
    np.testing.assert_allclose(at_runtime, edited, atol=3e-5 * np.abs(edited).max())


@pytest.mark.parametrize("arch", ["llama", "gemma2", "phi3", "qwen3_moe"])
def test_a_gguf_names_the_same_readers(
    arch: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_folder(arch, dtype="float32"), path, file_type="F32")
    with GgufSource(path) as gguf:
        layout = gguf_to_mlx.layout(gguf)
        found = from_gguf.find_readers(gguf, layout)
        places = layout.places()
    by_path = {f"{one.path}.weight": one for one in find_readers(load(tiny_folder(arch)))}
    assert {path for one in found for path in places[one.path]} == set(by_path)
    for one in found:
        other = by_path[places[one.path][0]]
        assert (one.kind, one.layer, one.component) == (other.kind, other.layer, other.component)
        if other.gain is None:
            assert one.gain is None
        else:
            np.testing.assert_allclose(np.array(one.gain), np.array(other.gain), atol=1e-3)
