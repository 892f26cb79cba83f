"""Kinds of edits on the demo, from the command line to files that mlx-lm and llama.cpp run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from click.testing import CliRunner

from abl_mlx.behaviour import evaluate
from abl_mlx.behaviour.refusals import rates
from abl_mlx.cli.main import cli
from abl_mlx.demo import MODEL_PATH
from abl_mlx.inputs import prompts
from abl_mlx.models import from_gguf
from abl_mlx.models.chat_model import ChatModel, load
from abl_mlx.models.module_weights import module_parts, module_shape
from abl_mlx.outputs import adapter_outputs
from convert.gguf.file import GgufSource
from convert.mlx_to_gguf import write_gguf
from tests.commands.test_undo import check_back, tensors
from tests.outputs.test_mlx_quantized import quantize
from tests.support.command import abl_mlx, fails

HELD_OUT = prompts.load_demo().harmful.test.take(20)


def refused(model: evaluate.InLlamaCpp) -> float:
    """The share of held-out harmful prompts that llama.cpp refuses with this file."""
    return rates(model(HELD_OUT.texts, 32), HELD_OUT.prompts).refusal_rate


def misused(*arguments: object) -> str:
    """What a command says whose flags make no sense together."""
    result = CliRunner().invoke(cli, list(map(str, arguments)))
    assert result.exit_code == 2, result.stderr
    return str(result.stderr.splitlines()[-1])


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo as people download models."""
    path = tmp_path_factory.mktemp("demo") / "demo-Q4_K_M.gguf"
    write_gguf(MODEL_PATH, path, file_type="Q4_K_M")
    return path


# --- reflections -------------------------------------------------------------------------------


def test_reflections_end_refusals_in_four_bits(
    four_bits: Path, direction: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    out, lora = tmp_path / "out.gguf", tmp_path / "out.lora.gguf"
    record = abl_mlx("apply", direction, four_bits, "-o", out, "-o", lora, "--kind", "reflect")
    assert record["leak"]["total"] < 1e-3
    assert refused(evaluate.InLlamaCpp(out)) <= 0.05
    assert refused(evaluate.InLlamaCpp(four_bits, lora)) <= 0.05
    assert abl_mlx("audit", out)["label"]["kind"] == "reflect"
    compared = abl_mlx("diff", four_bits, out, "--direction", direction)
    assert compared["leak"]["total"] < 1e-3
    assert set(compared["leak"]["tensors"]) == set(compared["changed"])


def test_reflections_are_undone(direction: Path, tmp_path: Path) -> None:
    edited, back = tmp_path / "edited", tmp_path / "back"
    abl_mlx("apply", direction, "demo", "-o", edited, "--kind", "reflect")
    before, after = tensors(MODEL_PATH), tensors(edited)
    r = abl_mlx_direction(direction)
    name = "model.layers.2.mlp.down_proj.weight"
    np.testing.assert_allclose(r @ after[name], -(r @ before[name]), atol=2e-4)
    assert (before["model.embed_tokens.weight"] == after["model.embed_tokens.weight"]).all()
    # The component is still in the weights, with the other sign: nothing else has to be kept.
    abl_mlx("undo", edited, "-o", back, "--direction", direction)
    check_back(MODEL_PATH, edited, back, "float16")


# --- readers -----------------------------------------------------------------------------------


def test_readers_end_refusals_in_four_bits(
    four_bits: Path, direction: Path, tmp_path: Path
) -> None:
    pytest.importorskip("xllamacpp")
    out, folder = tmp_path / "out.gguf", tmp_path / "folder"
    record = abl_mlx("apply", direction, four_bits, "-o", out, "-o", folder, "--edit", "readers")
    assert record["leak"]["total"] < 2e-3
    edited = record["written"][0]["leak"]["tensors"]
    assert {name.split(".")[-2] for name in edited} == {
        "token_embd", "attn_q", "attn_k", "attn_v", "ffn_gate", "ffn_up",
    }  # fmt: skip
    assert refused(evaluate.InLlamaCpp(out)) <= 0.05
    assert refusals_in_mlx(folder) <= 0.05
    compared = abl_mlx("diff", four_bits, out, "--direction", direction)
    assert compared["leak"]["total"] < 2e-3
    assert set(compared["leak"]["tensors"]) == set(compared["changed"]) == set(edited)
    audited = abl_mlx("audit", out)
    assert audited["verdict"] == "edited"
    assert any("weights that read the stream" in one for one in audited["evidence"])
    # llama.cpp holds no adapter for a tied head, which the demo's refusals need: that is said.
    lora = abl_mlx(
        "apply", direction, four_bits, "-o", tmp_path / "x.lora.gguf", "--edit", "readers"
    )
    assert lora["written"][0]["left_out"] == ["token_embd.weight"]


@pytest.mark.parametrize("bits", [2, 4])
def test_readers_of_a_quantized_folder(bits: int, direction: Path, tmp_path: Path) -> None:
    source, out, adapter = tmp_path / "source", tmp_path / "out", tmp_path / "out.adapter"
    quantize(MODEL_PATH, source, bits=bits, group_size=64)
    record = abl_mlx("apply", direction, source, "-o", out, "-o", adapter, "--edit", "readers")
    assert record["leak"]["total"] < 2e-3
    assert refusals_in_mlx(out) <= 0.05
    assert refusals_in_mlx(source, adapter) <= 0.05


def test_readers_are_undone(direction: Path, tmp_path: Path) -> None:
    edited, back, again = tmp_path / "edited", tmp_path / "back", tmp_path / "again"
    flags = "--edit", "readers", "--keep-undo"
    record = abl_mlx("run", "demo", "-o", edited, *flags, "--limit", 20, "--layer", 2)
    assert record["before"]["harmful_refusal_rate"] >= 0.95
    assert record["after"]["harmful_refusal_rate"] <= 0.05
    assert record["kl"]["k1"] < 0.01
    assert record["component"]["after"] > 0.5  # it is still there, and nothing reads it
    abl_mlx("undo", edited, "-o", back)
    check_back(MODEL_PATH, edited, back, "float16")
    said = fails("undo", edited, "-o", tmp_path / "undo.adapter")
    assert "write the model instead" in said
    # By the base alone.
    second = tmp_path / "second"
    abl_mlx("apply", direction, "demo", "-o", second, "--edit", "readers")
    abl_mlx("undo", second, "-o", again, "--direction", direction, "--base", "demo")
    check_back(MODEL_PATH, second, again, "float16")


def test_readers_are_refused_where_they_make_no_sense(direction: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for flags, said in (
        (("--pin", "harmless"), "--pin is about weights that write"),
        (("--mtp",), "--mtp is about weights that write"),
        (("--tensors", "ffn"), "--tensors is about weights that write"),
        (("--kind", "reflect"), "leave it out, or --edit readers"),
    ):
        assert said in misused("apply", direction, "demo", "-o", out, "--edit", "readers", *flags)
    said = misused("run", "demo", "-o", out, "--edit", "readers", "--search", 3)
    assert "--search and --edit readers" in said
    assert not out.exists()


def test_adapters_of_readers_have_the_rows_of_the_gguf(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """llama's queries and keys have their rows in another order in a GGUF than in MLX."""
    base, out, lora = (tmp_path / name for name in ("b.gguf", "o.gguf", "o.lora.gguf"))
    vector = tmp_path / "r.npy"
    np.save(vector, np.random.default_rng(3).standard_normal((2, 64)).astype(np.float32))
    write_gguf(tiny_folder("llama", dtype="float32"), base, file_type="F32")
    abl_mlx("apply", vector, base, "-o", out, "-o", lora, "--edit", "readers")
    tokens = mx.array([[5, 9, 200, 31]])
    with GgufSource(base) as gguf, GgufSource(out) as edited:
        plain = from_gguf.load(gguf)[0].model(tokens)
        wanted = from_gguf.load(edited)[0].model(tokens)
        with adapter_outputs.in_mlx(gguf, lora) as chat:
            found = chat.model(tokens)
    assert mx.abs(plain - wanted).max().item() > 0.01
    assert mx.abs(found - wanted).max().item() < 1e-4


def refusals_in_mlx(folder: Path, adapter: Path | None = None) -> float:
    """The share of held-out harmful prompts that mlx-lm refuses with this folder."""
    chat = load(folder, adapter=adapter)
    return rates(evaluate.in_mlx(chat)(HELD_OUT.texts, 32), HELD_OUT.prompts).refusal_rate


def abl_mlx_direction(path: Path) -> np.ndarray:
    """The unit direction (256,) of a direction file."""
    from abl_mlx.directions import direction_file

    values = np.array(direction_file.read(path).selected)[0].astype(np.float64)
    return values / np.linalg.norm(values)


def test_reflections_are_refused_where_they_make_no_sense(direction: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = misused("apply", direction, "demo", "-o", out, "--kind", "reflect", "--strength", 0.5)
    assert "leave --strength out" in said
    said = misused("run", "demo", "-o", out, "--kind", "reflect", "--search", 3)
    assert "--search and --kind reflect" in said
    said = fails("run", "demo", "-o", out, "--kind", "reflect", "--induce")
    assert "--kind" in said
    assert not out.exists()


# --- heads and experts -------------------------------------------------------------------------


def test_some_heads_of_a_gguf(four_bits: Path, direction: Path, tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    out, lora, folder = (tmp_path / name for name in ("o.gguf", "o.lora.gguf", "folder"))
    flags = "--heads", "2.2,2.3", "--kind", "reflect"
    record = abl_mlx("apply", direction, four_bits, "-o", out, "-o", lora, "-o", folder, *flags)
    for one in record["written"]:
        assert set(one["leak"]["tensors"]) == {"blk.2.attn_output.weight"}
        assert one["leak"]["total"] < 1e-3
    r, name = abl_mlx_direction(direction), "blk.2.attn_output.weight"
    before, after = tensors(four_bits), tensors(out)
    assert [key for key in before if (before[key] != after[key]).any()] == [name]
    edited = slice(2 * 32, 4 * 32)
    along, now = (r @ one[name] for one in (before, after))
    np.testing.assert_allclose(now[edited], -along[edited], atol=1e-3)
    # Other heads lie in the same blocks of 256 columns, whose scales may change.
    others = np.r_[0:64, 128:256]
    np.testing.assert_allclose(now[others], along[others], atol=1e-3)
    moved = np.linalg.norm((after[name] - before[name])[:, others])
    assert moved < 0.05 * np.linalg.norm(before[name][:, others])
    # The same edit in a file, in an adapter and in a folder.
    answers = [
        one(HELD_OUT.texts[:6], 24)
        for one in (evaluate.InLlamaCpp(out), evaluate.InLlamaCpp(four_bits, lora))
    ]
    assert answers[0] == answers[1]
    assert abl_mlx("audit", out)["label"]["heads"] == "2.2,2.3"
    compared = abl_mlx("diff", four_bits, out, "--direction", direction)
    assert set(compared["leak"]["tensors"]) == set(compared["changed"]) == {name}
    assert compared["leak"]["total"] < 1e-3


def test_heads_by_their_ranking(tmp_path: Path) -> None:
    found, out, back = (tmp_path / name for name in ("d.safetensors", "out", "back"))
    record = abl_mlx("measure", "demo", "-o", found, "--rank-parts", "--limit", 16, "--layer", 2)
    ranking = record["direction"]["heads"]
    assert {(one["layer"], one["number"]) for one in ranking[:2]} == {(2, 2), (2, 3)}
    assert "experts" not in record["direction"]
    abl_mlx("apply", found, "demo", "-o", out, "--heads", 2, "--keep-undo")
    before, after = tensors(MODEL_PATH), tensors(out)
    (changed,) = [name for name in before if (before[name] != after[name]).any()]
    assert changed == "model.layers.2.self_attn.o_proj.weight"
    abl_mlx("undo", out, "-o", back)
    again = tensors(back)
    np.testing.assert_allclose(again[changed], before[changed], atol=1e-4)
    # A number needs a ranking, which this file lacks for experts.
    said = fails("apply", found, "demo", "-o", tmp_path / "y", "--experts", 2)
    assert "--rank-parts" in said
    said = fails("apply", found, "demo", "-o", tmp_path / "y", "--experts", "0.1")
    assert "layer 0 of this model has no experts" in said
    said = misused("run", "demo", "-o", tmp_path / "y", "--heads", "2.2", "--search", 3)
    assert "--search and --heads 2.2" in said


@pytest.mark.parametrize(
    ("command", "flags", "expected"),
    [
        ("run", ("--heads", "99.1"), "layer 99 of this model has no heads"),
        ("run", ("--heads", "0.99"), "layer 0 of this model has 8 heads"),
        ("run", ("--layers", "98-99"), "no weights to edit in layer 98: they are in layers 0 to 3"),
        ("run", ("--edit", "readers", "--layers", "99"), "no weights to edit in layer 99"),
        ("show", ("--layers", "98-99"), "no weights to edit in layer 98"),
    ],
)
def test_parts_that_a_model_lacks_are_told_before_measuring(
    command: str, flags: tuple[str, ...], expected: str, tmp_path: Path
) -> None:
    more = ("-o", tmp_path / "out") if command == "run" else ("Hello",)
    result = CliRunner().invoke(cli, list(map(str, (command, "demo", *more, *flags))))
    assert result.exit_code == 1
    assert expected in result.stderr.splitlines()[-1]
    assert "measure and choose" not in result.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("form", ["folder", "gguf", "quantized"])
def test_some_experts_alone(form: str, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    source, vector = tiny_folder("qwen3_moe", dtype="float32"), tmp_path / "r.npy"
    r = np.random.default_rng(3).standard_normal(64)
    np.save(vector, r.astype(np.float32))
    r /= np.linalg.norm(r)
    out = tmp_path / "out"
    if form == "quantized":
        source = quantize(source, tmp_path / "source", bits=4, group_size=32)
    elif form == "gguf":
        write_gguf(source, tmp_path / "source.gguf", file_type="F32")
        source, out = tmp_path / "source.gguf", tmp_path / "out.gguf"
    record = abl_mlx("apply", vector, source, "-o", out, "--experts", "1.0,1.2")
    assert record["leak"]["total"] < 2e-3
    tokens = mx.array([[5, 9, 200, 31]])
    plain, edited = loaded(source), loaded(out)
    assert mx.abs(plain.model(tokens) - edited.model(tokens)).max().item() > 1e-4
    for layer in range(len(plain.layers)):
        old, new = (
            dequantized(one.layers[layer].mlp.switch_mlp.down_proj) for one in (plain, edited)
        )
        for expert in range(len(old)):
            left = np.linalg.norm(r @ new[expert]) / np.linalg.norm(r @ old[expert])
            if layer == 1 and expert in (0, 2):
                assert left < 5e-3
            else:
                assert (old[expert] == new[expert]).all()


def loaded(place: Path) -> ChatModel:
    """A folder or a GGUF as a model in MLX."""
    if place.is_dir():
        return load(place)
    with GgufSource(place) as gguf:
        return from_gguf.load(gguf)[0]


def dequantized(module: nn.Module) -> np.ndarray:
    """A stack of experts in float64: (E, d, n)."""
    found = np.zeros(module_shape(module))
    for index, values in module_parts(module):
        found[index] = np.array(values)
    return found
