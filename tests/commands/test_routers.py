"""`--edit routers`: fewer tokens are sent to some experts, by the bias of their routers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from abl_mlx.directions import parts
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.edits.edit import leak, target
from abl_mlx.edits.routing import LOWERED, Routing
from abl_mlx.inputs import prompts
from abl_mlx.models import routers
from abl_mlx.models.distributions import kl_divergence
from abl_mlx.models.logits import first_reply_token
from abl_mlx.models.writers import LOGIT_ROUTER, SCORE_ROUTER, find_writers
from convert.base.errors import UserError
from tests.commands.test_kinds import abl_mlx_direction, loaded, misused, refusals_in_mlx
from tests.commands.test_undo import tensors
from tests.outputs.test_mlx_quantized import quantize
from tests.support import published, tiny_gguf, upcycled, zoo
from tests.support.command import abl_mlx, fails
from tests.support.gguf_recipes import RECIPES

HARMFUL, HARMLESS = [[5, 6, 7, 30], [8, 9], [3, 11, 60]], [[20, 21, 22], [4, 40]]


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("deepseek_v3", SCORE_ROUTER), ("glm4_moe", SCORE_ROUTER), ("lfm2_moe", SCORE_ROUTER),
        ("bailing_moe_v3", SCORE_ROUTER), ("afmoe", SCORE_ROUTER), ("minimax", SCORE_ROUTER),
        ("gpt_oss", LOGIT_ROUTER),
    ],
)  # fmt: skip
def test_no_token_is_sent_to_lowered_experts(arch: str, kind: str) -> None:
    chat = zoo.chat(arch)
    writers = find_writers(chat)
    found = routers.find_routers(chat, writers)
    assert {one.kind for one in found} == {kind}
    ranked = parts.experts(chat, writers, HARMFUL, HARMLESS)
    busiest = {
        layer: max((one for one in ranked if one.layer == layer), key=lambda one: one.harmful)
        for layer in {one.layer for one in found}
    }
    assert all(one.harmful > 0 for one in busiest.values())
    edit = Routing(frozenset((layer, one.number) for layer, one in busiest.items()))
    for one in edit.chosen(found):
        values = one.module[one.router].astype(mx.float32)
        edited = target(edit, one, one.router, values)
        wanted = np.array(values, np.float64)
        wanted[..., busiest[one.layer].number] -= LOWERED[kind]
        np.testing.assert_allclose(np.array(edited), wanted, rtol=1e-6)
        assert leak(edit, one, one.router, values, edited).value < 1e-6
        assert leak(edit, one, one.router, values, values).value == pytest.approx(1)
        one.module[one.router] = edited
    after = {
        (one.layer, one.number): one for one in parts.experts(chat, writers, HARMFUL, HARMLESS)
    }
    for layer, one in busiest.items():
        assert after[layer, one.number].harmful == 0
    per_token = sum(one.harmful for one in ranked)
    assert sum(one.harmful for one in after.values()) == pytest.approx(per_token)


@pytest.fixture(scope="module")
def vector(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A direction, of which an edit of routers needs no more than the file."""
    path = tmp_path_factory.mktemp("direction") / "r.npy"
    np.save(path, np.random.default_rng(3).standard_normal(256).astype(np.float32))
    return path


RECIPE = {"deepseek v3": ("exp_probs_b.bias", 2.0), "gpt-oss": ("ffn_gate_inp.bias", 20.0)}


@pytest.mark.parametrize("recipe", RECIPE)
def test_in_a_gguf_nothing_but_these_biases_changes(
    recipe: str, vector: Path, tmp_path: Path
) -> None:
    what, lowered = RECIPE[recipe]
    source = tiny_gguf.write(tmp_path / "s.gguf", RECIPES[recipe], GGMLQuantizationType.F32)
    out, folder, back = tmp_path / "out.gguf", tmp_path / "folder", tmp_path / "back.gguf"
    flags = "--edit", "routers", "--experts", "1.0,1.2"
    record = abl_mlx("apply", vector, source, "-o", out, *flags, "--keep-undo")
    name = f"blk.1.{what}"
    assert set(record["written"][0]["leak"]["tensors"]) == {name}
    assert record["leak"]["total"] < 1e-6
    before, after = tensors(source), tensors(out)
    assert [key for key in before if (before[key] != after[key]).any()] == [name]
    moved = (after[name] - before[name]).reshape(-1)
    np.testing.assert_allclose(moved[[0, 2]], -lowered, rtol=1e-5)
    assert not np.delete(moved, [0, 2]).any()
    # The same from the file to a folder, in which mlx-lm chooses these experts no more.
    abl_mlx("apply", vector, source, "-o", folder, *flags)
    chat = loaded(folder)
    counted = parts.experts(chat, find_writers(chat), HARMFUL, HARMLESS)
    sent = {one.number: one.harmful for one in counted if one.layer == 1}
    assert sent[0] == sent[2] == 0
    assert sum(sent.values()) > 0
    assert abl_mlx("audit", out)["label"]["edit"] == "routers"
    compared = abl_mlx("diff", source, out, "--direction", vector)
    assert set(compared["leak"]["tensors"]) == set(compared["changed"]) == {name}
    assert compared["leak"]["total"] < 1e-6
    abl_mlx("undo", out, "-o", back)
    np.testing.assert_allclose(tensors(back)[name], before[name], atol=2e-6)


@pytest.mark.parametrize("form", ["floats", "four bits", "to gguf"])
def test_in_a_folder(form: str, vector: Path, tmp_path: Path) -> None:
    source, out = published.write(tmp_path / "source", "deepseek v3", "bfloat16"), tmp_path / "out"
    if form == "four bits":
        source = quantize(source, tmp_path / "quantized", bits=4, group_size=32)
    elif form == "to gguf":
        out = tmp_path / "out.gguf"
    flags = "--edit", "routers", "--experts", "1.1", "--strength", 0.5
    record = abl_mlx("apply", vector, source, "-o", out, *flags)
    assert record["leak"]["total"] < 5e-3
    assert record["options"]["edit"] == "routers"
    if form == "to gguf":
        plain = tmp_path / "plain.gguf"
        abl_mlx("convert", source, plain)
        source = plain
    before, after = tensors(source), tensors(out)
    (changed,) = [key for key in before if (before[key] != after[key]).any()]
    moved = (after[changed] - before[changed]).reshape(-1)
    np.testing.assert_allclose(moved[1], -1, atol=1e-2)
    assert not np.delete(moved, 1).any()


def test_run_ranks_experts_and_lowers_the_first(tmp_path: Path) -> None:
    source, out = published.write(tmp_path / "source", "deepseek v3"), tmp_path / "out"
    for name, verb in (("bad", "Describe"), ("good", "Name")):
        lines = [f"{verb} thing number {n}." for n in range(24)]
        (tmp_path / f"{name}.txt").write_text("\n".join(lines))
    record = abl_mlx(
        "run", source, "-o", out, "--edit", "routers", "--experts", 2, "--layer", 0, "--anyway",
        "--harmful", tmp_path / "bad.txt", "--harmless", tmp_path / "good.txt", "--limit", 4,
        "--max-tokens", 2, "--keep-undo",
    )  # fmt: skip
    first = record["direction"]["experts"][:2]
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    before, after = tensors(source), tensors(out)
    assert [key for key in before if (before[key] != after[key]).any()] == [name]
    moved = np.flatnonzero(after[name] - before[name])
    assert set(moved) == {one["number"] for one in first}
    assert record["leak"]["total"] < 1e-6
    abl_mlx("undo", out, "-o", tmp_path / "back")
    np.testing.assert_allclose(tensors(tmp_path / "back")[name], before[name], atol=1e-6)
    said = fails("undo", out, "-o", tmp_path / "x.adapter")
    assert "the edit of routers is not undone by an adapter" in said


def test_refusals_that_depend_on_experts_end_with_them(direction: Path, tmp_path: Path) -> None:
    """Where routers send harmful prompts to experts that refuse, they need not be edited."""
    source, out = tmp_path / "source", tmp_path / "out"
    upcycled.write_routed(source, abl_mlx_direction(direction))
    chat, sets = loaded(source), prompts.load_demo()
    encoded = [
        [chat.encode(one) for one in part.test.take(20).prompts]
        for part in (sets.harmful, sets.harmless)
    ]
    ranked = parts.experts(chat, find_writers(chat), *encoded)
    first = {(one.layer, one.number) for one in ranked[:4]}
    assert first == {(layer, number) for layer in (2, 3) for number in upcycled.REFUSING}
    named = ",".join(f"{layer}.{number}" for layer, number in sorted(first))
    assert refusals_in_mlx(source) >= 0.95
    abl_mlx("apply", direction, source, "-o", out, "--edit", "routers", "--experts", named)
    assert refusals_in_mlx(out) <= 0.05
    edited = loaded(out)
    plain, after = (first_reply_token(one, encoded[1]) for one in (chat, edited))
    assert kl_divergence(plain, after).mean().item() < 1e-3


def test_where_there_is_no_such_bias(
    vector: Path, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    source, r = tiny_folder("qwen3_moe", dtype="float32"), tmp_path / "r.npy"
    np.save(r, np.ones(64, np.float32))
    said = fails("apply", r, source, "-o", tmp_path / "x", "--edit", "routers", "--experts", "1.0")
    assert "the routers of this model (qwen3_moe) have no bias that could be lowered" in said
    said = fails("run", "demo", "-o", tmp_path / "x", "--edit", "routers", "--experts", 2)
    assert "(llama) have no bias" in said
    gguf = tiny_gguf.write(tmp_path / "s.gguf", RECIPES["deepseek v3"], GGMLQuantizationType.F32)
    flags = "--edit", "routers", "--experts"
    said = fails("apply", vector, gguf, "-o", tmp_path / "x.gguf", *flags, "0.1")
    assert "--experts 0.1: layer 0 of this model has no router with a bias" in said
    said = fails("apply", vector, gguf, "-o", tmp_path / "x.lora.gguf", *flags, "1.1")
    assert "an adapter holds no bias of a router" in said
    for more, told in (
        ((), "name them by --experts N"),
        (("--experts", "1.1", "--heads", "1.1"), "--edit routers and --heads"),
        (("--experts", "1.1", "--pin", "harmless"), "--edit routers and --pin"),
        (("--experts", "1.1", "--norm", "columns"), "--edit routers and --norm columns"),
        (("--experts", "1.1", "--kind", "reflect"), "--edit routers"),
        (("--experts", "1.1", "--mtp"), "--edit routers and --mtp"),
    ):
        args = "apply", vector, gguf, "-o", tmp_path / "x.gguf", "--edit", "routers"
        assert told in misused(*args, *more)
    assert not list(tmp_path.glob("x*"))


def test_a_ranking_names_the_experts() -> None:
    from abl_mlx.choices import Editing
    from abl_mlx.commands.edit_choice import edit_of

    ranking = [{"layer": 1, "number": 3}, {"layer": 0, "number": 1}]
    file = DirectionFile(mx.ones((1, 8)), None, {"summary": {"experts": ranking}})
    edit = edit_of(file, Editing(edit="routers", experts="1", strength=0.5))
    assert edit == Routing(frozenset({(1, 3)}), 0.5)
    with pytest.raises(UserError, match="--rank-parts"):
        edit_of(file, Editing(edit="routers", experts="3"))
