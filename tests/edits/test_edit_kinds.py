"""Edits beyond one projection for all: by layer and component, norms kept, pinned; at runtime."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from abl_mlx.choices import Editing, SteerOptions
from abl_mlx.commands import session as steered
from abl_mlx.commands.edit_choice import check, edit_of, make_edit
from abl_mlx.directions.pinning import embedding_means, held_at
from abl_mlx.directions.trial import Trial
from abl_mlx.edits import slabs
from abl_mlx.edits.edit import Edit, leak, target
from abl_mlx.edits.steering import Intervention, ablation, steering
from abl_mlx.inputs import prompts
from abl_mlx.models.chat_model import load
from abl_mlx.models.writers import Writer, find_writers
from abl_mlx.outputs import adapter
from convert.base.errors import UsageError, UserError
from tests.models.test_writers import edit_in_place, random_direction
from tests.support import tiny

RNG = np.random.default_rng(0)
D, N, V = 48, 32, 100


def f32(values):
    return mx.array(np.asarray(values, dtype=np.float32))


def f64(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def writer(path, kind, layer):
    return Writer(path, kind, layer, None, False, nn.Module())


ATTENTION = writer("model.layers.1.self_attn.o_proj", "linear", 1)
MLP = writer("model.layers.2.mlp.down_proj", "linear", 2)
EXPERTS = writer("model.layers.0.mlp.switch_mlp.down_proj", "experts", 0)
EMBEDDING = writer("model.embed_tokens", "embedding", -1)


@pytest.mark.parametrize(
    ("path", "kind", "expected"),
    [
        ("model.layers.1.self_attn.o_proj", "linear", "attention"),
        ("model.layers.1.mlp.down_proj", "linear", "mlp"),
        ("blk.3.ffn_down.weight", "linear", "mlp"),
        ("blk.3.attn_output.weight", "linear", "attention"),
        ("model.layers.0.block_sparse_moe.switch_mlp.down_proj", "experts", "mlp"),
        ("transformer.h.2.mlp.c_proj", "linear", "mlp"),
        ("transformer.h.2.attn.c_proj", "linear", "attention"),
        ("backbone.layers.2.mixer.out_proj", "linear", "attention"),
        ("gpt_neox.layers.0.mlp.dense_4h_to_h", "linear", "mlp"),
        ("transformer.blocks.0.ffn.experts.mlp.3.w2", "linear", "mlp"),
    ],
)
def test_components_by_name(path, kind, expected):
    assert writer(path, kind, 1).component == expected


def test_every_layer_of_every_tiny_model_has_attention_and_an_mlp(tiny_folder):
    for arch in sorted(tiny.ARCHITECTURES):
        found = {(w.layer, w.component) for w in find_writers(load(tiny_folder(arch)))}
        layers = {layer for layer, _ in found if layer >= 0}
        for layer in layers:
            assert {(layer, "attention"), (layer, "mlp")} <= found, (arch, layer)


def test_a_direction_and_a_strength_for_each_layer():
    directions = RNG.normal(size=(3, 2, D))
    profile = {"attention": (0.1, 0.5, 0.9), "mlp": (1.0, 0.0, -0.25)}
    edit = Edit(f32(directions), 2.0, profile=profile)
    values = RNG.normal(size=(D, N))
    for one, layer, strength in ((ATTENTION, 1, 1.0), (MLP, 2, -0.5)):
        q, _ = np.linalg.qr(directions[layer].T)
        expected = values - strength * q @ q.T @ values
        np.testing.assert_allclose(
            np.array(target(edit, one, "weight", f32(values))), expected, atol=1e-4
        )
        assert edit.strength_of(one) == pytest.approx(strength)
    rows = RNG.normal(size=(V, D))
    q, _ = np.linalg.qr(directions[0].T)
    np.testing.assert_allclose(
        np.array(target(edit, EMBEDDING, "weight", f32(rows))), rows - 2 * rows @ q @ q.T, atol=1e-4
    )
    deeper = replace(MLP, layer=3)
    for short in (edit, replace(edit, directions=edit.directions[0])):
        with pytest.raises(UserError, match="for 3 layers, but the model has a layer 3"):
            short.chosen([MLP, deeper])
    nothing = replace(MLP, layer=1, path="model.layers.1.mlp.down_proj")
    assert edit.chosen([ATTENTION, MLP, nothing, EMBEDDING]) == [ATTENTION, MLP, EMBEDDING]
    assert not edit.is_plain
    assert Edit(f32(directions[0])).is_plain


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize("one", [MLP, EMBEDDING], ids=["linear", "embedding"])
@pytest.mark.parametrize("norm", ["columns", "rows"])
def test_kept_norms_are_kept_and_cost_what_they_cost(norm, one, strength):
    u = RNG.normal(size=D)
    u /= np.linalg.norm(u)
    axis = 1 if one.kind == "embedding" else 0  # of the stream
    values = RNG.normal(size=(V, D) if axis else (D, N)) * np.exp(
        RNG.normal(size=(1, D) if axis else (D, 1))  # entries of the stream differ in size
    )
    edit = Edit(f32(u[None]), strength, norm=norm)
    found = f64(target(edit, one, "weight", f32(values)))
    plain = values - strength * (np.outer(values @ u, u) if axis else np.outer(u, u @ values))
    kept = axis if norm == "columns" else 1 - axis
    lengths = np.linalg.norm(values, axis=kept, keepdims=True)
    expected = plain * lengths / np.linalg.norm(plain, axis=kept, keepdims=True)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(np.linalg.norm(found, axis=kept, keepdims=True), lengths, rtol=1e-4)
    share = leak(edit, one, "weight", f32(values), f32(found)).value
    if norm == "columns":
        assert share < 1e-5
        if strength == 1:
            left = found @ u if axis else u @ found
            assert np.abs(left).max() < 1e-4
    else:
        # The share of the component that is back, which is why rows warn.
        along = (lambda w: w @ u) if axis else (lambda w: u @ w)
        back = np.linalg.norm(along(found) - along(plain)) / np.linalg.norm(
            strength * along(values)
        )
        assert share == pytest.approx(back, rel=1e-3)
        assert share > 0.05
    half = f32(values + 0.5 * (found - values))
    assert leak(edit, one, "weight", f32(values), half).value > 0.2


@pytest.mark.parametrize("one", [MLP, EMBEDDING], ids=["linear", "embedding"])
@pytest.mark.parametrize(
    "changes", [{"norm": "columns"}, {"pin": 0.7}, {"strength": 0.5}, {"strength": -2.0}]
)
def test_slabs_edit_and_measure_the_same(one, changes):
    if "pin" in changes:
        changes = {"pin": mx.array([changes["pin"], -0.2])}
    edit = Edit(f32(RNG.normal(size=(2, D))), **changes)
    values = RNG.normal(size=(V, D) if one.kind == "embedding" else (D, N)).astype(np.float32)
    part = type("Part", (), {"name": "x", "edit": edit, "writer": one, "parameter": "weight"})()
    edited = slabs.exact_edit(part, values)
    expected = target(edit, one, "weight", mx.array(values))
    np.testing.assert_allclose(edited.target, np.array(expected), atol=1e-5)
    basis = f64(edit.basis(one))
    moved = values - edited.target
    lines = moved @ basis.T if one.kind == "embedding" else (basis @ moved).T
    np.testing.assert_allclose(edited.taken, lines, atol=1e-4)
    written = (edited.target + 0.1 * RNG.normal(size=values.shape)).astype(np.float32)
    found, wanted = leak(edit, one, "weight", values, written), f64(expected)
    away = written.astype(np.float64) - wanted
    left = away @ basis.T if one.kind == "embedding" else (basis @ away).T
    for name, value in (
        ("missing", left), ("wanted", lines), ("error2", away), ("target2", wanted)
    ):  # fmt: skip
        assert getattr(found, name) == pytest.approx(np.sum(value**2), rel=1e-3), name


def test_rows_are_refused_in_slabs_and_norms_in_adapters_and_at_runtime():
    edit = Edit(f32(RNG.normal(size=(1, D))), norm="rows")
    part = type("Part", (), {"name": "x", "edit": edit, "writer": MLP, "parameter": "weight"})()
    with pytest.raises(UserError, match="--norm columns"):
        slabs.exact_edit(part, np.ones((D, N), np.float32))
    with pytest.raises(UserError, match="no adapter"):
        adapter.change(edit, MLP, np.ones((1, N), np.float32))
    with pytest.raises(UserError, match="not at runtime"), ablation([MLP], edit):
        pass


def stream(chat, tokens):
    """The stream after each layer: (L, T, d) float64."""
    from abl_mlx.models.capture import Recorder

    with Recorder(chat) as recorder:
        recorder.keep(mx.array([tokens.shape[1]]), range(-tokens.shape[1], 0))
        chat.model(tokens)
        states = recorder.take()
    return f64(states[0])


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_a_pinned_stream_holds_the_value_everywhere(arch, tiny_folder):
    chat = load(tiny_folder(arch))
    writers = find_writers(chat)
    scale = embedding_means(chat, writers, [[1]], [[1]]).scale
    if scale is None:
        pytest.skip("more than a constant stands behind its embedding")
    direction = random_direction(chat.width)
    tokens = mx.array([chat.encode("How do I plan a garden?")])
    size = np.abs(stream(chat, tokens)).max()
    edit = Edit(direction, pin=mx.array([0.5]) / scale)
    with ablation(writers, edit):
        at_runtime = chat.model(tokens)
        mx.eval(at_runtime)
    edit_in_place(writers, edit)
    r = f64(direction[0])
    held = stream(chat, tokens) @ (r / np.linalg.norm(r))
    np.testing.assert_allclose(held, 0.5, atol=1e-5 * max(1, size))
    edited = np.array(chat.model(tokens))
    np.testing.assert_allclose(
        np.array(at_runtime) / np.abs(edited).max(), edited / np.abs(edited).max(), atol=2e-5
    )


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_pins_are_the_means_of_what_the_first_layer_gets(arch, tiny_folder):
    chat = load(tiny_folder(arch))
    writers = find_writers(chat)
    harmful, harmless = [[5, 6, 7], [6, 6]], [[9], [10, 5, 5, 11]]
    found = embedding_means(chat, writers, harmful, harmless)
    table = f64(chat.model.model.embed_tokens.weight)
    factor = chat.width**0.5 if arch == "gemma2" else 1.0
    assert found.scale == pytest.approx(factor, rel=1e-3)
    directions = mx.concatenate([random_direction(chat.width, seed) for seed in (1, 2)])
    q, r = np.linalg.qr(f64(directions).T)
    basis = (q * np.sign(np.diag(r))).T
    pins = found.pins(directions)
    for name, sequences in (("harmful", harmful), ("harmless", harmless)):
        mean = factor * table[[token for one in sequences for token in one]].mean(0)
        np.testing.assert_allclose(pins[name], basis @ mean, rtol=1e-2, atol=1e-5)
    held = held_at("harmless", pins, found.scale, 2)
    np.testing.assert_allclose(np.array(held) * factor, pins["harmless"], rtol=1e-3)
    np.testing.assert_allclose(np.array(held_at("0.5", None, factor, 2)), 0.5 / factor, rtol=1e-5)
    assert held_at(None, None, None, 2) is None
    with pytest.raises(UserError, match="--pin needs"):
        held_at("harmless", pins, None, 2)
    with pytest.raises(UserError, match="abl-mlx measure"):
        held_at("harmful", None, 1.0, 2)
    # Without an embedding among the writers, or with embeddings of positions, nothing is known.
    assert embedding_means(chat, writers[1:], harmful, harmless).pins(directions) is None


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_profiles_and_layers_at_runtime_equal_the_weights(arch, tiny_folder):
    chat = load(tiny_folder(arch))
    writers = find_writers(chat)
    count = len(chat.layers)
    directions = mx.stack([random_direction(chat.width, seed) for seed in range(count)])
    profile = {"attention": [1.0] + [0.3] * (count - 1), "mlp": [0.0] + [0.8] * (count - 1)}
    edit = Edit(directions, profile=profile)
    tokens = mx.array([chat.encode("How do I plan a garden?")])
    with ablation(writers, edit):
        at_runtime = chat.model(tokens)
        mx.eval(at_runtime)
    edit_in_place(writers, edit)
    edited = np.array(chat.model(tokens))
    np.testing.assert_allclose(
        np.array(at_runtime) / np.abs(edited).max(), edited / np.abs(edited).max(), atol=2e-5
    )


def test_an_adapter_holds_profiles_and_pins():
    edit = Edit(
        f32(RNG.normal(size=(2, D))), 0.5, pin=mx.array([0.3, -1.0]),
        profile={"attention": [1, 1, 1], "mlp": [1, 1, 0.25]},
    )  # fmt: skip
    for one, shape in ((MLP, (D, N)), (EMBEDDING, (V, D))):
        values = RNG.normal(size=shape).astype(np.float32)
        parts = [((slice(0, shape[0]), slice(0, shape[1])), mx.array(values))]
        found = adapter.components(edit, one, shape, parts)
        low = adapter.change(edit, one, found.along)
        changed = values + 0.5 * low.left @ low.right
        expected = np.array(target(edit, one, "weight", mx.array(values)))
        np.testing.assert_allclose(changed, expected, atol=1e-4)
        assert adapter.leak_of(edit, one, found, 0.5, low).value < 1e-5
        assert adapter.leak_of(edit, one, found, 0.4, low).value == pytest.approx(0.2, rel=1e-3)


# --- reflections -------------------------------------------------------------------------------


@pytest.mark.parametrize("one", [MLP, EXPERTS], ids=["linear", "experts"])
@pytest.mark.parametrize("rank", [1, 3])
def test_a_reflection_is_householders_and_its_own_inverse(one, rank):
    selected = f32(RNG.normal(size=(rank, D)))
    edit = make_edit(selected, Editing(kind="reflect"))
    q, _ = np.linalg.qr(f64(selected).T)
    mirror = np.eye(D) - 2 * q @ q.T
    assert not edit.touches(EMBEDDING)
    values = RNG.normal(size=(3, D, N) if one.kind == "experts" else (D, N))
    expected = mirror @ values
    found = target(edit, one, "weight", f32(values))
    np.testing.assert_allclose(f64(found), expected, atol=1e-5)
    again = target(edit, one, "weight", found)
    np.testing.assert_allclose(f64(again), values, atol=1e-5)
    lengths = np.linalg.norm(values, axis=-2)
    np.testing.assert_allclose(np.linalg.norm(f64(found), axis=-2), lengths, rtol=1e-5)
    # A removal is half of the way, which the leak says.
    half = target(make_edit(selected, Editing()), one, "weight", f32(values))
    assert leak(edit, one, "weight", f32(values), half).value == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize(
    "flags", [{"strength": 0.5}, {"norm": "columns"}, {"norm": "rows"}, {"pin": "harmless"}]
)
def test_a_reflection_goes_with_no_strength_norm_or_pin(flags):
    with pytest.raises(UsageError, match="--kind reflect"):
        check(Editing(kind="reflect", **flags))


def test_strengths_by_layer_are_not_of_a_reflection():
    recipe = {"profile": {"attention": [0.5], "mlp": [0.5]}, "embedding": True}
    edit = make_edit(mx.ones((1, D)), Editing(kind="reflect"), recipe=recipe)
    assert edit.profile is None
    assert edit.strength == 2


# --- interventions on the stream ---------------------------------------------------------------


def test_interventions_are_their_formulas():
    states = RNG.normal(size=(2, 5, D))
    directions = RNG.normal(size=(2, D))
    q, _ = np.linalg.qr(directions.T)
    inside = states @ q @ q.T
    cases = [
        (Intervention("ablate", f32(directions), 0.7), states - 0.7 * inside),
        (Intervention("add", f32(directions), -2.0), states - 2 * directions.sum(0)),
        (Intervention("pin", f32(directions[:1]), value=3.0),
         states + np.outer(3 - states @ (u := directions[0] / np.linalg.norm(directions[0])), u)
         .reshape(2, 5, D)),
    ]  # fmt: skip
    for one, expected in cases:
        np.testing.assert_allclose(np.array(one.after(f32(states))), expected, atol=1e-4)
        chosen = replace(one, positions=(1, -1, 7, -9))
        mixed = states.copy()
        mixed[:, [1, 4]] = expected[:, [1, 4]]
        np.testing.assert_allclose(np.array(chosen.after(f32(states))), mixed, atol=1e-4)
    half = Intervention("ablate", f32(directions)).after(f32(states).astype(mx.bfloat16))
    assert half.dtype == mx.bfloat16


@pytest.mark.parametrize("arch", sorted(tiny.ARCHITECTURES))
def test_steering_reaches_the_stream_where_it_is_asked_to(arch, tiny_folder):
    chat = load(tiny_folder(arch))
    tokens = mx.array([chat.encode("How do I plan a garden?")])
    direction = random_direction(chat.width)
    r = f64(direction[0]) / np.linalg.norm(f64(direction[0]))
    before = stream(chat, tokens)
    last = len(chat.layers) - 1
    with steering(chat, Intervention("pin", direction, value=2.0, layers=frozenset({0}))):
        steered = stream(chat, tokens)
    np.testing.assert_allclose(steered[0] @ r, 2.0, atol=1e-3)
    np.testing.assert_allclose(steered[0] - np.outer(steered[0] @ r, r),
                               before[0] - np.outer(before[0] @ r, r), atol=1e-3)  # fmt: skip
    with steering(chat, Intervention("ablate", direction)):
        assert np.abs(stream(chat, tokens) @ r).max() < 1e-3
    only_last = Intervention("add", direction, layers=frozenset({last}), positions=(-1,))
    with steering(chat, only_last):
        steered = stream(chat, tokens)
    np.testing.assert_allclose(steered[:-1], before[:-1], atol=1e-4)
    np.testing.assert_allclose(steered[-1, :-1], before[-1, :-1], atol=1e-4)
    np.testing.assert_allclose(steered[-1, -1], before[-1, -1] + f64(direction[0]), atol=1e-3)
    with steering(chat, Intervention("add", direction, 3.0, layers=frozenset({-1}))):
        assert np.abs(stream(chat, tokens) - before).max() > 0.1
    np.testing.assert_array_equal(stream(chat, tokens), before)


def test_steering_refuses_what_does_not_fit(tiny_folder):
    chat = load(tiny_folder("llama"))
    wrong = [
        (Intervention("add", mx.ones((1, chat.width + 1))), "does not fit"),
        (Intervention("add", mx.ones((1, chat.width)), layers=frozenset({99})), "no layer 99"),
    ]
    for one, message in wrong:
        with pytest.raises(UserError, match=message), steering(chat, one):
            pass


# --- on the demo, which really refuses ---------------------------------------------------------


@pytest.fixture(scope="module")
def demo():
    return steered.load("demo", SteerOptions())


def first_tokens(demo, options):
    """What an edit does to first reply tokens: `trial.Effect`."""
    sets = prompts.load_demo()
    harmful, harmless = (
        [demo.chat.encode(text) for text in part.test.take(24).texts]
        for part in (sets.harmful, sets.harmless)
    )
    trial = Trial(demo.chat, demo.writers, harmful, harmless)
    return trial.refusal_before[0], trial.of_edit(edit_of(demo.direction, options))


def test_negative_strengths_strengthen(demo):
    before, weaker = first_tokens(demo, Editing(strength=0.3))
    _, stronger = first_tokens(demo, Editing(strength=-0.3))
    assert weaker.refusal < before - 1 < before + 0.5 < stronger.refusal
    assert stronger.refused == 1


def test_a_reflected_model_answers(demo):
    _, effect = first_tokens(demo, Editing(kind="reflect"))
    assert effect.refused == 0
    assert effect.kl < 0.05


@pytest.mark.parametrize("pin", ["harmless", "harmful", "-0.1"])
def test_pinned_models_answer_and_leave_the_rest(pin, demo):
    _, effect = first_tokens(demo, Editing(pin=pin))
    assert effect.refused == 0
    assert effect.kl < 0.01
    assert edit_of(demo.direction, Editing(pin=pin)).pin is not None
