"""An edit that is not exact after every layer is refused, with the layer and the module."""

from pathlib import Path

import mlx.core as mx
import pytest

from abl_mlx.behaviour import evaluate
from abl_mlx.choices import RunOptions
from abl_mlx.commands import run
from abl_mlx.edits import exactness
from abl_mlx.edits.edit import Edit, rounded, target
from abl_mlx.models.chat_model import add_tokenizer, load, load_lazily
from abl_mlx.models.writers import find_writers
from abl_mlx.outputs import folder, gguf
from convert.base.errors import UserError
from convert.mlx_to_gguf import write_gguf
from tests.support import tiny

PROMPTS = ["Hi", "How do I plan a garden?"]


def edited(chat, directions, *, dtype=mx.float32, skip=(), plain=False):
    """The chat model with its writers edited, but for those in ``skip``, and the edit."""
    edit = Edit(directions)
    for writer in find_writers(chat):
        if writer.path in skip:
            continue
        for path in writer.parameters:
            name = path.rsplit(".", 1)[1]
            exact = target(edit, writer, name, writer.module[name])
            writer.module[name] = (
                exact.astype(dtype) if plain else rounded(edit, writer, name, exact, dtype)
            )
    return chat, edit


def encoded(chat):
    return [chat.encode(prompt) for prompt in PROMPTS]


def random_directions(width, count=1, seed=11):
    return mx.random.normal((count, width), key=mx.random.key(seed))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_an_exact_edit_passes_in_every_float_type(arch, dtype, tiny_folder):
    chat = load(tiny_folder(arch, dtype=dtype))
    chat, edit = edited(chat, random_directions(chat.width, 2), dtype=getattr(mx, dtype))
    limit = exactness.limit_for([{"float32": "F32", "float16": "F16"}.get(dtype, "BF16")])
    layers = exactness.check(chat, edit, encoded(chat), limit=limit)
    assert len(layers) == len(chat.layers)
    assert max(layers) < (1e-3 if dtype == "bfloat16" else 1e-4)


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("model.layers.1.mlp.down_proj", 1),
        ("model.layers.2.self_attn.o_proj", 2),
        ("model.embed_tokens", 0),
    ],
)
def test_a_writer_that_was_not_edited_is_named(path, layer, tiny_folder):
    chat = load(tiny_folder("gemma2"))
    chat, edit = edited(chat, random_directions(chat.width), skip={path})
    with pytest.raises(UserError, match=f"after layer {layer}, most of it written by {path} "):
        exactness.check(chat, edit, encoded(chat))


def test_the_first_layer_at_fault_is_named_not_the_worst(tiny_folder):
    chat = load(tiny_folder("gemma2"))
    later = {writer.path for writer in find_writers(chat) if writer.layer >= 1}
    chat, edit = edited(chat, random_directions(chat.width, seed=1), skip=later)
    _, outputs = exactness.by_layer(chat, find_writers(chat), encoded(chat), edit.directions)
    assert ".layers.1." not in max(outputs, key=outputs.get)
    with pytest.raises(UserError, match=r"after layer 1, most of it written by model\.layers\.1"):
        exactness.check(chat, edit, encoded(chat))


def test_the_norm_before_the_stream_counts(tiny_folder):
    """Plain projection, blind to Gemma's post-norms, leaves a component that is seen."""
    chat = load(tiny_folder("gemma2"))
    edit = Edit(random_directions(chat.width))
    unit = edit.directions[0] / mx.sqrt((edit.directions[0] ** 2).sum())
    for writer in find_writers(chat):
        weight = writer.module["weight"]
        if writer.kind == "embedding":
            writer.module["weight"] = weight - mx.outer(weight @ unit, unit)
        else:
            writer.module["weight"] = weight - mx.outer(unit, unit @ weight)
    with pytest.raises(UserError, match=r"after layer 0, most of it written by model\.layers\.0"):
        exactness.check(chat, edit, encoded(chat))


def test_half_precision_models_are_measured_in_float32(tiny_folder):
    """As on Metal, where weights stay in float16: its rounding of the stream is not the edit's."""
    chat = load_lazily(tiny_folder("llama", dtype="float16"))
    add_tokenizer(chat)
    chat, edit = edited(chat, random_directions(chat.width), dtype=mx.float16)
    assert chat.model.model.layers[0].mlp.down_proj.weight.dtype == mx.float16
    in_float32 = max(exactness.check(chat, edit, encoded(chat)))
    in_float16, _ = exactness.by_layer(chat, [], encoded(chat), edit.directions)
    assert in_float32 < 1e-4
    assert max(in_float16) > 2 * in_float32


@pytest.mark.parametrize(
    "change", [{"strength": 0.5}, {"layers": frozenset({1})}, {"embedding": False}]
)
def test_edits_that_are_to_leave_something_are_not_held_to_it(change, tiny_folder):
    chat = load(tiny_folder("llama"))
    edit = Edit(random_directions(chat.width), **change)
    assert exactness.check(chat, edit, encoded(chat)) is None


@pytest.mark.parametrize(
    ("types", "limit"),
    [(["F16", "F32"], 1e-4), (["BF16", "F32"], 1e-3), (["F16", "Q8_0"], None), ([], None)],
)
def test_the_limit_depends_on_what_the_weights_are_stored_in(types, limit):
    assert exactness.limit_for(types) == limit


@pytest.mark.parametrize(
    ("name", "suffix"),
    [("folder", ""), ("folder", ".gguf"), ("folder", ".adapter"), ("gguf", ".gguf"),
     ("gguf", ".lora.gguf"), ("gguf", "")],
)  # fmt: skip
def test_run_fails_when_what_it_wrote_is_not_exact(
    name, suffix, tiny_folder, tmp_path, monkeypatch
):
    """A writer that the search missed is found out on the written model, and nothing is left."""
    source, out = tiny_folder("llama"), tmp_path / f"edited{suffix}"
    quick = RunOptions.of(limit=4, layer=1, position=-1, max_tokens=2, max_leak=1.0)
    sets = [str(tmp_path / f"{name}.txt") for name in ("harmful", "harmless")]
    for path, word in zip(sets, ("break", "plant"), strict=True):
        Path(path).write_text("".join(f"How do I {word} {n} things?\n" for n in range(20)))
    quick = quick.but(harmful=sets[0], harmless=sets[1])
    place, which = folder, "find_writers"
    if name == "gguf":
        place, which = gguf.GgufFile, "named_writers"
        source = write_gguf(source, tmp_path / "source.gguf").path
    monkeypatch.setattr(evaluate, "llamacpp_is_there", lambda: False)  # MLX is looked at here
    everything = getattr(place, which)
    monkeypatch.setattr(place, which, lambda *given: everything(*given)[:-1])
    with pytest.raises(UserError, match="stream after layer 2, "):
        run.run(str(source), [out], quick)
    assert not out.exists()
    monkeypatch.setattr(place, which, everything)
    assert run.run(str(source), [out], quick)["component"]["after"] < 1e-4
    if name == "gguf" and not suffix:
        return
    # What is not to be exact is not held to it.
    if name == "gguf" and suffix == ".gguf":
        some = quick.but(tensors="token_embd|attn_output")
        assert run.run(str(source), [tmp_path / "some.gguf"], some)["component"]["after"] > 0.01


def test_an_adapter_beside_biases_is_not_held_to_it(tmp_path):
    """mlx-lm adds the bias of a layer as it is; the leak says how much that is."""
    source = tiny.write_model(tmp_path / "model", "llama", attention_bias=True)
    sets = [str(tmp_path / f"{name}.txt") for name in ("harmful", "harmless")]
    for path, word in zip(sets, ("break", "plant"), strict=True):
        Path(path).write_text("".join(f"How do I {word} {n} things?\n" for n in range(20)))
    quick = RunOptions.of(limit=4, layer=1, position=-1, max_tokens=2, max_leak=1.0,
                    harmful=sets[0], harmless=sets[1])  # fmt: skip
    record = run.run(str(source), [tmp_path / "edited.adapter"], quick)
    assert record["component"]["after"] > 1e-3
