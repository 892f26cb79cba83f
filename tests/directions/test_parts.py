"""Attention heads and experts: their ranking, and edits of some of them alone."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from abl_mlx.choices import Editing
from abl_mlx.commands.edit_choice import check, make_edit
from abl_mlx.directions import parts
from abl_mlx.edits import slabs
from abl_mlx.edits.edit import Edit, leak, target
from abl_mlx.edits.steering import ablation
from abl_mlx.models.hooks import around
from abl_mlx.models.writers import Writer, find_writers
from abl_mlx.outputs.gguf_plan import TensorPlan
from convert.base.errors import UsageError, UserError
from tests.models.test_readers import edit_weights
from tests.models.test_writers import random_direction
from tests.support import zoo

RNG = np.random.default_rng(0)
D, N, HEADS, EXPERTS = 48, 64, 4, 5
ATTENTION = Writer(
    "blk.1.attn_output.weight", "linear", 1, None, True, nn.Module(), parts=HEADS, inputs=N
)
STACK = Writer("blk.1.ffn_down_exps.weight", "experts", 1, None, True, nn.Module(), parts=EXPERTS)
HARMFUL, HARMLESS = [[5, 6, 7, 30], [8, 9], [3, 11, 60]], [[20, 21, 22], [4, 40]]


def projector(directions: np.ndarray) -> np.ndarray:
    q, _ = np.linalg.qr(directions.T)
    return np.asarray(q @ q.T)


def test_the_columns_of_some_heads_alone_are_edited() -> None:
    directions, values = RNG.normal(size=(2, D)), RNG.normal(size=(D, N))
    edit = Edit(mx.array(directions.astype(np.float32)), 0.7, heads=frozenset({(1, 0), (1, 2)}))
    wanted = values.copy()
    for head in (0, 2):
        columns = slice(head * N // HEADS, (head + 1) * N // HEADS)
        wanted[:, columns] -= 0.7 * projector(directions) @ values[:, columns]
    source = mx.array(values.astype(np.float32))
    found = target(edit, ATTENTION, "weight", source)
    np.testing.assert_allclose(np.array(found), wanted, atol=1e-5)
    assert edit.parameters(ATTENTION) == ("weight",)
    assert leak(edit, ATTENTION, "weight", source, found).value < 1e-5
    assert leak(edit, ATTENTION, "weight", source, source).value == pytest.approx(1)
    # A part of the columns is edited as the whole is.
    plan = TensorPlan("x", edit, ATTENTION, "weight", None, None)  # type: ignore[arg-type]
    for columns in (slice(0, 24), slice(24, 64)):
        part = plan.part(slabs.Slab(slice(0, D), columns))
        here = np.ascontiguousarray(values[:, columns], np.float32)
        edited = slabs.exact_edit(part, here)
        np.testing.assert_allclose(edited.target, wanted[:, columns], atol=1e-5)
        assert leak(part.edit, part.writer, part.parameter, here, edited.target).missing < 1e-8


def test_some_experts_alone_are_edited() -> None:
    directions, values = RNG.normal(size=(1, D)), RNG.normal(size=(EXPERTS, D, 8))
    bias = RNG.normal(size=(EXPERTS, D))
    edit = Edit(mx.array(directions.astype(np.float32)), experts=frozenset({(1, 3), (0, 1)}))
    across = np.eye(D) - projector(directions)
    for stack, parameter in ((values, "weight"), (bias, "bias")):
        wanted = stack.copy()
        wanted[3] = across @ stack[3]
        found = target(edit, STACK, parameter, mx.array(stack.astype(np.float32)))
        np.testing.assert_allclose(np.array(found), wanted, atol=1e-5)
    for expert in range(EXPERTS):
        wanted = across @ values[expert] if expert == 3 else values[expert]
        one = mx.array(values[expert].astype(np.float32))
        alone = target(edit.of_expert(expert), STACK, "weight", one)
        slab = edit.of_slab(slice(expert * D, (expert + 1) * D), slice(0, 8))
        for found in (alone, target(slab, STACK, "weight", one)):
            np.testing.assert_allclose(np.array(found), wanted, atol=1e-5)


def test_nothing_else_is_touched() -> None:
    edit = Edit(mx.ones((1, D)), heads=frozenset({(1, 0)}))
    other = Writer("blk.1.ffn_down.weight", "linear", 1, None, False, nn.Module())
    embedding = Writer("token_embd.weight", "embedding", -1, None, False, nn.Module())
    assert edit.chosen([embedding, ATTENTION, other, STACK]) == [ATTENTION]
    for heads, experts, said in (
        ({(1, 4)}, None, "--heads 1.4: layer 1 of this model has 4 heads"),
        ({(0, 0)}, None, "--heads 0.0: layer 0 of this model has no heads"),
        (None, {(1, 5)}, "--experts 1.5: layer 1 of this model has 5 experts"),
    ):
        wrong = Edit(
            mx.ones((1, D)), heads=None if heads is None else frozenset(heads),
            experts=None if experts is None else frozenset(experts),
        )  # fmt: skip
        with pytest.raises(UserError, match=said):
            wrong.chosen([ATTENTION, STACK])


@pytest.mark.parametrize("arch", ["llama", "gemma2", "gpt2", "qwen3_moe", "gpt_oss"])
def test_at_runtime_as_in_the_weights(arch: str) -> None:
    chat = zoo.chat(arch)
    writers = find_writers(chat)
    some = {"heads": frozenset({(0, 1), (1, 0)})}
    if arch in ("qwen3_moe", "gpt_oss"):
        some["experts"] = frozenset({(0, 0), (1, 1), (1, 2)})
    edit = Edit(random_direction(chat.width), 1.5, **some)
    tokens = mx.array([chat.encode("How do I plan a garden?")])
    plain = np.array(chat.model(tokens))
    with ablation(writers, edit):
        at_runtime = np.array(chat.model(tokens))
    for writer in edit.chosen(writers):
        for parameter in edit.parameters(writer):
            values = writer.module[parameter].astype(mx.float32)
            writer.module[parameter] = target(edit, writer, parameter, values)
    edited = np.array(chat.model(tokens))
    assert np.abs(plain - edited).max() > 1e-3
    np.testing.assert_allclose(at_runtime, edited, atol=3e-5 * np.abs(edited).max())


def test_heads_are_ranked_by_what_they_write() -> None:
    chat = zoo.chat("gemma2")  # a norm stands behind its attention
    writers = find_writers(chat)
    direction = random_direction(chat.width)
    found = parts.heads(chat, writers, direction, HARMFUL, HARMLESS)
    attending = {one.layer: one for one in writers if one.kind == "linear" and one.parts}
    assert len(found) == sum(one.parts for one in attending.values())
    assert [part.difference for part in found] == sorted(
        (part.difference for part in found), reverse=True
    )
    # Over all heads of a layer these are the component of what the attention puts out.
    outputs: dict[int, list[np.ndarray]] = {layer: [] for layer in attending}

    def keep(layer: int) -> Any:
        def wrapper(call: Any, x: mx.array) -> Any:
            output = call(x)
            outputs[layer].append(np.array(output[0, -1]).astype(np.float64))
            return output

        return wrapper

    with around([(one.module, keep(layer)) for layer, one in attending.items()]):
        for tokens in HARMFUL:
            mx.eval(chat.model(mx.array([tokens])))
    for layer, one in attending.items():
        unit = np.array(Edit(direction).basis(one)[0]).astype(np.float64)
        whole = sum(part.harmful for part in found if part.layer == layer)
        assert whole == pytest.approx(np.mean(outputs[layer] @ unit), abs=1e-4)


def test_a_planted_head_comes_first() -> None:
    chat = zoo.chat("llama")
    writers, r = find_writers(chat), random_direction(chat.width)[0]
    r = r / mx.sqrt((r * r).sum())
    one = next(one for one in writers if one.kind == "linear" and one.parts and one.layer == 1)
    edit_weights([one], Edit(r[None]))
    bad, good = HARMFUL, HARMLESS
    rows: dict[str, list[mx.array]] = {}

    def keep(call: Any, x: mx.array) -> Any:
        rows.setdefault("all", []).append(x[0, -1])
        return call(x)

    with around([(one.module, keep)]):
        for tokens in [*bad, *good]:
            mx.eval(chat.model(mx.array([tokens])))
    states = mx.stack(rows["all"])
    width = one.inputs // one.parts
    apart = (states[: len(bad)].mean(axis=0) - states[len(bad) :].mean(axis=0))[width : 2 * width]
    planted = mx.zeros((chat.width, one.inputs))
    planted[:, width : 2 * width] = 30 * r[:, None] * apart[None] / mx.sqrt((apart * apart).sum())
    one.module["weight"] = one.module["weight"] + planted
    first = parts.heads(chat, writers, r[None], bad, good)[0]
    assert (first.layer, first.number) == (1, 1)


def test_experts_are_counted_by_their_routers() -> None:
    chat = zoo.chat("qwen3_moe")
    writers = find_writers(chat)
    found = parts.experts(chat, writers, HARMFUL, HARMLESS, first=3)
    layers = chat.model.model.layers
    per_token = layers[0].mlp.top_k
    for layer, block in enumerate(layers):
        here = [part for part in found if part.layer == layer]
        # Every token is sent to so many experts.
        assert sum(part.harmful for part in here) == pytest.approx(per_token)
        counts = np.zeros(len(here))

        def gated(call: Any, x: mx.array, counts: np.ndarray = counts) -> Any:
            gates = call(x)
            for row in np.array(mx.argsort(-gates[0], axis=-1))[:, :per_token]:
                counts[row] += 1 / len(row) * per_token / gates.shape[1]
            return gates

        with around([(block.mlp.gate, gated)]):
            for tokens in HARMFUL:
                mx.eval(chat.model(mx.array([tokens])))
        for part in here:
            assert part.harmful == pytest.approx(counts[part.number] / len(HARMFUL), abs=1e-6)
    assert all(part.stable is not None and 0 <= part.stable <= 1 for part in found)
    assert sum(part.stable or 0 for part in found) == pytest.approx(3)
    with pytest.raises(UserError, match="no experts"):
        parts.experts(zoo.chat("llama"), find_writers(zoo.chat("llama")), HARMFUL, HARMLESS)


def test_flags_name_parts() -> None:
    ranking = [{"layer": 2, "number": 3}, {"layer": 0, "number": 1}]
    assert parts.chosen("2.3,0.1", None, "--heads") == {(2, 3), (0, 1)}
    assert parts.chosen("1", ranking, "--heads") == {(2, 3)}
    for text, given in (("3", ranking), ("1", None)):
        with pytest.raises(UserError, match="--rank-parts"):
            parts.chosen(text, given, "--experts")
    for flags in ({"norm": "columns"}, {"pin": "harmless"}, {"edit": "readers"}):
        with pytest.raises(UsageError, match="--heads and --"):
            check(Editing(heads="2", **flags))
    # Before a direction is known, no number of heads is.
    assert make_edit(mx.ones((1, 4)), Editing(heads="2")).heads is None
