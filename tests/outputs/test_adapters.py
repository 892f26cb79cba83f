"""Adapters: the whole edit beside a base that keeps its bytes, in mlx-lm and in llama.cpp."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from gguf import GGMLQuantizationType

from abl_mlx.behaviour import evaluate
from abl_mlx.demo import MODEL_PATH
from abl_mlx.edits.edit import Edit, orthonormal, target
from abl_mlx.inputs import prompts
from abl_mlx.inputs.sources import Source
from abl_mlx.models import chat_model, from_gguf
from abl_mlx.models.writers import Writer, find_writers
from abl_mlx.outputs import adapter as adapters
from abl_mlx.outputs import adapter_outputs, staging
from abl_mlx.outputs.gguf_plan import plan
from convert import adapters as files
from convert.architectures.gguf_writers import find
from convert.base.errors import UserError
from convert.gguf.file import GgufSource
from convert.mlx_to_gguf import write_gguf
from tests.support import tiny_gguf
from tests.support.command import abl_mlx, fails
from tests.support.gguf_recipes import RECIPES

WIDTH = 64


def directions(k: int, width: int = WIDTH) -> mx.array:
    return mx.array(np.random.default_rng(7).standard_normal((k, width)).astype(np.float32))


def hashes(place: Path) -> dict[str, str]:
    every = sorted(place.rglob("*")) if place.is_dir() else [place]
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in every if path.is_file()
    }


def quantized(source: Path, to: Path, bits: int, group: int = 32, mode: str = "affine") -> Path:
    mlx_lm.convert(
        str(source), str(to), quantize=True, q_bits=bits, q_group_size=group, q_mode=mode
    )
    return to


# --- the factors -------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [1.0, 0.4, -1.0])
@pytest.mark.parametrize("kind", ["linear", "experts", "embedding"])
@pytest.mark.parametrize("gain", [False, True])
def test_factors_and_leak_against_float64(kind: str, alpha: float, gain: bool) -> None:
    rng = np.random.default_rng(0)
    d, n = WIDTH, 48
    shape = {"linear": (d, n), "experts": (3, d, n), "embedding": (n, d)}[kind]
    values = rng.standard_normal(shape).astype(np.float32)
    g = mx.array(rng.uniform(0.5, 2, d).astype(np.float32)) if gain else None
    edit = Edit(directions(2), alpha)
    writer = Writer("w", kind, 0, g, False, None)  # type: ignore[arg-type]
    # In two parts, cut along each axis that may be cut.
    cuts = [slice(0, 20), slice(20, None)]
    if kind == "embedding":
        parts = [((cut, slice(None)), mx.array(values[cut])) for cut in cuts]
    elif kind == "linear":
        parts = [((slice(None), cut), mx.array(values[:, cut])) for cut in cuts]
        by_rows = [((cut, slice(None)), mx.array(values[cut])) for cut in cuts]
        again = adapters.components(edit, writer, shape, by_rows)
    else:
        parts = [
            ((e, slice(None), cut), mx.array(values[e][:, cut])) for e in range(3) for cut in cuts
        ]
    found = adapters.components(edit, writer, shape, parts)
    if kind == "linear":
        np.testing.assert_allclose(again.along, found.along, atol=1e-5)
    assert found.square == pytest.approx(float((values.astype(np.float64) ** 2).sum()), rel=1e-5)

    one = adapters.change(edit, writer, found.along)
    assert one.shape == shape
    assert one.rank == 2
    exact = np.asarray(target(edit, writer, "weight", mx.array(values)).astype(mx.float32))
    np.testing.assert_allclose(values + alpha * one.left @ one.right, exact, atol=2e-5)
    assert adapters.leak_of(edit, writer, found, alpha, one).value < 1e-6
    # With half the scale, half of it is missing; and the weights are off by just that.
    half = adapters.leak_of(edit, writer, found, alpha / 2, one)
    assert half.value == pytest.approx(0.5, rel=1e-5)
    off = np.linalg.norm(values + alpha / 2 * one.left @ one.right - exact)
    assert half.error == pytest.approx(off / np.linalg.norm(exact), rel=1e-4)


def test_both_formats_hold_what_was_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)

    def change(kind: str, *shape: int) -> files.LowRank:
        *first, out, n = shape
        left, right = rng.standard_normal((*first, out, 2)), rng.standard_normal((*first, 2, n))
        return files.LowRank(kind, left.astype(np.float32), right.astype(np.float32))

    changes = {
        "token_embd.weight": change("embedding", 9, 8),
        "blk.0.attn_output.weight": change("linear", 8, 5),
        "blk.0.ffn_down_exps.weight": change("experts", 3, 8, 6),
    }
    adapter = files.Adapter(0.75, changes)
    files.write_gguf(tmp_path / "a.lora.gguf", "llama", adapter)
    files.write_mlx(tmp_path, adapter)
    with GgufSource(tmp_path / "a.lora.gguf") as written:
        assert written.metadata["adapter.lora.alpha"] == 1.5  # llama.cpp divides by the rank
        assert written.tensors["token_embd.weight.lora_a"].shape == (9, 2)
        assert written.tensors["token_embd.weight.lora_b"].shape == (8, 2)
        assert written.tensors["blk.0.attn_output.weight.lora_a"].shape == (2, 5)
    kinds = {name: one.kind for name, one in changes.items()}
    for read in (files.read_gguf(tmp_path / "a.lora.gguf"), files.read_mlx(tmp_path, kinds)):
        assert read.scale == 0.75
        assert read.changes.keys() == changes.keys()
        for name, one in read.changes.items():
            assert one.kind == changes[name].kind
            np.testing.assert_array_equal(one.left, changes[name].left)
            np.testing.assert_array_equal(one.right, changes[name].right)


# --- mlx-lm ------------------------------------------------------------------------------------

BASES = [
    ("llama", None, "affine"),
    ("llama", 2, "affine"),
    ("qwen2", 4, "affine"),  # tied
    ("gemma3_text", 4, "affine"),  # gains, tied, a scaled embedding
    ("qwen3_moe", 4, "affine"),  # experts
    ("qwen3_moe", None, "affine"),
    ("llama", 4, "mxfp4"),
    ("llama", 8, "mxfp8"),
]


@pytest.mark.parametrize(("arch", "bits", "mode"), BASES)
def test_nothing_is_written_along_the_direction_with_an_mlx_adapter(
    arch: str, bits: int | None, mode: str, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_folder(arch, dtype="float32")
    if bits:
        base = quantized(base, tmp_path / "base", bits, mode=mode)
    before = hashes(base)
    chat = chat_model.load(base)
    edit = Edit(directions(2, chat.width))
    with staging.staging([tmp_path / "x.adapter"]) as (output,):
        _, _, note = adapter_outputs.write_mlx(chat, edit, find_writers(chat), output, {}, 1e-6)
    assert note is None

    # mlx-lm's own loader, on its own modules.
    model, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "x.adapter"))
    model.set_dtype(mx.float32)
    edited = chat_model.ChatModel(base, model, chat.tokenizer, chat.config)
    unit = orthonormal(edit.directions)
    asked = [chat.encode(text) for text in ("What is a garden?", "Tell me seven things.")]
    assert evaluate.component(chat, asked, unit)["max"] > 0.05
    # mlx-lm looks rows of these modes up in bfloat16.
    limit = 1e-5 if mode == "affine" else 2**-8
    assert evaluate.component(edited, asked, unit)["max"] < limit
    assert hashes(base) == before


def test_mlx_adapter_is_the_weight_edit(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    """At part strength and in some layers, with a tied head: the same logits as edited weights."""
    base = tiny_folder("qwen2", dtype="float32")
    direction = tmp_path / "direction.npy"
    np.save(direction, np.random.default_rng(3).normal(size=64).astype(np.float32))
    abl_mlx(
        "apply", direction, base, "-o", tmp_path / "x.adapter", "-o", tmp_path / "edited",
        "--strength", "0.6", "--layers", "1-2",
    )  # fmt: skip
    config = json.loads((tmp_path / "x.adapter" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["scale"] == 0.6
    tokens = mx.array([[5, 9, 200, 31]])
    original, _ = mlx_lm.load(str(base))
    with_adapter, _ = mlx_lm.load(str(base), adapter_path=str(tmp_path / "x.adapter"))
    edited, _ = mlx_lm.load(str(tmp_path / "edited"))
    unedited, ours, theirs = (m(tokens) for m in (original, with_adapter, edited))
    assert mx.abs(ours - theirs).max().item() < 1e-4
    assert mx.abs(unedited - theirs).max().item() > 0.01
    record = json.loads((tmp_path / "x.adapter" / "abl.json").read_text())
    assert [one["format"] for one in record["written"]] == ["MLX adapter", "MLX"]
    assert set(record["hashes"]["source"]) == {"model.safetensors"}
    assert "**This is an adapter.**" in (tmp_path / "x.adapter" / "README.md").read_text()


def test_biases_count_as_leak(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = tiny_folder("llama", dtype="float32", attention_bias=True)
    direction, out = tmp_path / "direction.npy", tmp_path / "x.adapter"
    np.save(direction, np.random.default_rng(3).normal(size=64).astype(np.float32))
    said = fails("apply", direction, base, "-o", out)
    assert "biases" in said
    assert "--max-leak" in said
    assert not out.exists()
    record = abl_mlx("apply", direction, base, "-o", out, "--max-leak", "0.5")
    one = record["written"][0]
    assert one["leak"]["tensors"]["model.layers.0.self_attn.o_proj.bias"]["leak"] == 1
    assert one["leak"]["tensors"]["model.layers.0.self_attn.o_proj.weight"]["leak"] < 1e-6
    assert 0.01 < one["leak"]["total"] < 0.5
    assert "3 biases" in one["note"]


# --- the demo ----------------------------------------------------------------------------------


def check_run(record: Any, *, limit: float = 1e-5) -> None:
    assert record["before"]["harmful_refusal_rate"] >= 0.95
    assert record["after"]["harmful_refusal_rate"] <= 0.05
    assert record["after"]["harmless_refusal_rate"] <= 0.05
    assert record["after"]["broken_rate"] == 0
    assert record["after"]["expected_answer_rate"] >= 0.6
    assert record["component"]["before"] > 0.5
    assert record["component"]["after"] < limit
    assert record["leak"]["max"] < 1e-6


@pytest.mark.parametrize("bits", [4, 2])
def test_mlx_adapter_on_the_quantized_demo(bits: int, tmp_path: Path) -> None:
    base = quantized(MODEL_PATH, tmp_path / "base", bits, 64)
    before, out = hashes(base), tmp_path / "demo.adapter"
    record = abl_mlx("run", base, "-o", f"{out}/", "--limit", 20, "--layer", 2, "--max-tokens", 32)
    check_run(record)
    assert record["evaluations"][0]["runtime"] == "mlx-lm"
    assert hashes(base) == before

    # As `mlx_lm.generate --adapter-path` does it.
    model, tokenizer = mlx_lm.load(str(base), adapter_path=str(out))
    question = prompts.load_demo().harmful.test.prompts[0]
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": question.text}], add_generation_prompt=True
    )
    assert mlx_lm.generate(model, tokenizer, asked, max_tokens=32).strip() == question.answer


def test_a_gguf_lora_of_precise_weights_may_leave_the_embedding_out(tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    write_gguf(MODEL_PATH, base)
    few = ("--limit", 4, "--layer", 2, "--max-tokens", 4)
    record = abl_mlx("run", base, "-o", tmp_path / "demo.lora.gguf", *few)
    one = record["evaluations"][0]
    assert one["left_out"] == ["token_embd.weight"]
    assert one["leak"]["max"] < 1e-3
    assert one["component"] > 1e-3  # which the embedding keeps


def test_gguf_lora_on_the_quantized_demo(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    base = tmp_path / "base.gguf"
    write_gguf(MODEL_PATH, base, file_type="Q2_K")
    before = hashes(base)
    record = abl_mlx(
        "run", base, "-o", tmp_path / "demo.lora.gguf", "--limit", 20, "--layer", 2,
        "--max-tokens", 40,
    )  # fmt: skip
    # The tied embedding keeps its component, and it is said.
    check_run(record, limit=0.05)
    one = record["evaluations"][0]
    assert one["runtime"] == "llama.cpp"
    assert one["left_out"] == ["token_embd.weight"]
    assert "token_embd.weight, which is the output head as well: left as it is" in one["note"]
    assert hashes(base) == before
    assert {path.name for path in tmp_path.iterdir()} == {
        "base.gguf", "demo.lora.gguf", "demo.lora.abl.json", "demo.lora.README.md",
        "demo.lora.report.html",
    }  # fmt: skip

    # llama.cpp once more, asked here, with the adapter and without.
    chosen = prompts.load_demo().harmful.test.take(8)
    answer = evaluate.InLlamaCpp(base, tmp_path / "demo.lora.gguf")(chosen.texts, 32)
    right = [r.strip() == p.answer for r, p in zip(answer, chosen.prompts, strict=True)]
    assert np.mean(right) >= 0.6
    plain = evaluate.InLlamaCpp(base)(chosen.texts, 32)
    assert not any(r.strip() == p.answer for r, p in zip(plain, chosen.prompts, strict=True))


def test_measured_on_a_folder_and_written_for_a_gguf(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    base, lora, edited = tmp_path / "base.gguf", tmp_path / "x.lora.gguf", tmp_path / "x.gguf"
    write_gguf(MODEL_PATH, base, file_type="Q4_K")
    before = hashes(base)
    record = abl_mlx(
        "run", "demo", "--gguf", base, "-o", lora, "-o", edited, "--limit", 12, "--layer", 2,
        "--max-tokens", 40, "--strength", "0.9",
    )  # fmt: skip
    assert [one["format"] for one in record["evaluations"]] == ["GGUF LoRA", "GGUF"]
    assert all(one["after"]["harmful_refusal_rate"] <= 0.05 for one in record["evaluations"])
    assert hashes(base) == before
    with GgufSource(lora) as written:
        assert written.metadata["adapter.lora.alpha"] == pytest.approx(0.9)
        assert written.metadata["abl_mlx.direction_sha256"] == record["direction"]["sha256"]


# --- llama.cpp ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ("llama", GGMLQuantizationType.Q4_K),
        ("llama", GGMLQuantizationType.Q2_K),
        ("mixtral", GGMLQuantizationType.Q6_K),
        ("olmo2", GGMLQuantizationType.Q5_K),  # gains
        # The columns of its ssm_out lie otherwise in MLX.
        ("qwen35, stretched", GGMLQuantizationType.Q4_0),
    ],
)
def test_nothing_is_written_along_the_direction_with_a_gguf_lora(
    recipe: str, kind: GGMLQuantizationType, tmp_path: Path
) -> None:
    base, lora = tmp_path / "base.gguf", tmp_path / "x.lora.gguf"
    template = {"tokenizer.chat_template": "{{ messages[0].content }}"}
    one = RECIPES[recipe]
    tiny_gguf.write(base, replace(one, more={**one.more, **template}), kind)
    with GgufSource(base) as gguf:
        width = gguf.tensors["token_embd.weight"].shape[-1]
        shapes = {name: entry.shape for name, entry in gguf.tensors.items()}
        named = find(gguf.architecture, shapes, gguf.metadata)
        edit = Edit(directions(2, width))
        plans = plan(gguf, edit, named)
        assert not any(one.tied for one in named)
        record = adapter_outputs.write_gguf(gguf, Source("base", base), lora, lora, plans, {}, 1e-6)
        unit, asked = orthonormal(edit.directions), [[3, 17, 5, 40, 22, 9], [7, 8]]
        chat, _ = from_gguf.load(gguf)
        assert evaluate.component(chat, asked, unit)["max"] > 0.05
        with adapter_outputs.in_mlx(gguf, lora) as with_lora:
            left = evaluate.component(with_lora, asked, unit)["max"]
    assert left < 1e-5
    assert record.types == ["rank 2"]


# --- refusals ----------------------------------------------------------------------------------


def test_outputs_that_do_not_fit_the_source(tmp_path: Path) -> None:
    base, direction = tmp_path / "base.gguf", tmp_path / "direction.npy"
    write_gguf(MODEL_PATH, base, file_type="Q8_0")
    np.save(direction, np.random.default_rng(3).normal(size=256).astype(np.float32))
    said = fails("apply", direction, base, "-o", tmp_path / "x.adapter")
    assert "x.adapter would be an adapter for mlx-lm" in said
    assert "x.lora.gguf" in said
    said = fails("apply", direction, "demo", "-o", tmp_path / "x.lora.gguf")
    assert "--gguf BASE.gguf" in said
    said = fails("apply", direction, base, "-o", tmp_path / "x.lora.gguf", "--layers", "7")
    assert "would be empty" in said
    said = fails("apply", direction, base, "-o", tmp_path / "x.lora.gguf", "--ollama-create", "x")
    assert "--ollama-create needs a GGUF" in said
    assert {path.name for path in tmp_path.iterdir()} == {"base.gguf", "direction.npy"}


def test_llama_cpp_ends_at_an_adapter_of_a_tied_embedding(tmp_path: Path) -> None:
    """Why a LoRA for a tied model leaves the embedding out: the head takes its factors, too."""
    pytest.importorskip("xllamacpp")
    base, lora = tmp_path / "base.gguf", tmp_path / "x.lora.gguf"
    write_gguf(MODEL_PATH, base, file_type="F16")
    with GgufSource(base) as gguf:
        rows, width = gguf.tensors["token_embd.weight"].shape
    left, right = np.ones((rows, 1), np.float32), np.ones((1, width), np.float32)
    change = files.LowRank("embedding", left, right)
    files.write_gguf(lora, "llama", files.Adapter(1.0, {"token_embd.weight": change}))
    with pytest.raises(UserError, match="ggml_can_mul_mat"):
        evaluate.InLlamaCpp(base, lora)(["Hello"], 2)


def test_tensors_that_llama_cpp_applies_no_adapter_to() -> None:
    class Gguf:
        architecture = "nemotron_h_moe"
        parts = (Path("x.gguf"),)
        tensors = frozenset({"blk.0.attn_output.weight", "blk.0.attn_output.scale"})

    names = ["blk.0.attn_output.weight", "blk.2.ffn_latent_up.weight"]
    writers = [files_writer(name) for name in names]
    with pytest.raises(UserError, match=r"no adapter to blk\.2\.ffn_latent_up\.weight"):
        adapter_outputs.check_gguf(Gguf(), writers)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"attn_output\.scale in x\.gguf scales"):
        adapter_outputs.check_gguf(Gguf(), writers[:1])  # type: ignore[arg-type]


def files_writer(name: str) -> Any:
    from convert.architectures.gguf_writers import GgufWriter

    return GgufWriter(name, "linear", 0)
