"""Real models, as people download them: MLX and llama.cpp say the same, and every command works."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.directions import direction_file
from abl_mlx.directions.direction_file import DirectionFile
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models import from_gguf
from convert.gguf.file import GgufSource
from tests.support.agreement import greedy, logprobs
from tests.support.command import abl_mlx
from tests.support.real_models import GEMMA3, LINES, QWEN, SMOLLM2, real_model
from tests.support.vocabularies import Vocabulary, plain, written

pytestmark = pytest.mark.real

#: In nats: llama.cpp rounds activations to 8 bits beside quantized weights, which moves unlikely
#: tokens of real models by a whole nat. Beside float weights it does not: the whole top 5 agrees.
NEAR, ALL_NEAR = 0.3, 0.05

PROMPTS = [
    "The capital of France is", "Once upon a time, there was a", "def fibonacci(n):",
    "1, 2, 3, 4, 5,", "Dear Sir or Madam,", "The three primary colours are",
    "import numpy as np\n", "Water boils at", "In the beginning", "To make a cup of tea, first",
    "La capitale de l'Italie est", "Der schnelle braune Fuchs", "SELECT name FROM users WHERE",
    "The opposite of hot is", "She opened the door and", "A triangle has", "E = mc",
    "Monday, Tuesday, Wednesday,", "Thank you for your", "The moon orbits the",
]  # fmt: skip


@pytest.fixture(scope="module", params=[SMOLLM2, GEMMA3])
def model(request: pytest.FixtureRequest) -> Path:
    return real_model(request.param)


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return real_model(SMOLLM2)


def planted(gguf: Path, out: Path) -> Path:
    """A direction file with a random direction, which any model can be edited along."""
    with GgufSource(gguf) as source:
        width = source.tensors["token_embd.weight"].shape[-1]
    rows = np.random.default_rng(0).standard_normal((1, width)).astype(np.float32)
    direction_file.save(out, DirectionFile(mx.array(rows / np.linalg.norm(rows))))
    return out


def test_two_hundred_lines_are_tokenized_as_llama_cpp_does(model: Path, tmp_path: Path) -> None:
    assert len(LINES) == 200
    assert [ascii(line) for line in tokenized_otherwise(model, tmp_path)] == []


def tokenized_otherwise(model: Path, folder: Path) -> list[str]:
    """Those of `LINES` whose tokens, or these tokens' text, are not llama.cpp's."""
    with GgufSource(model) as source:
        tokenizer = written(source.metadata, folder)
    unlike = []
    with Vocabulary(model) as oracle:
        for line in LINES:
            ids = plain(tokenizer, line)
            # What a server answers with is what transformers' decoder makes of the same ids.
            back = tokenizer.decode(ids, skip_special_tokens=False).strip()
            if ids != oracle.tokenize(line) or back not in (
                line.strip(),
                oracle.decode(ids).strip(),
            ):
                unlike.append(line)
    return unlike


def test_likeliest_tokens_are_llama_cpps(model: Path) -> None:
    short, apart = agreement(model)
    assert near_enough(short, apart), (max(short), np.median(apart))


def near_enough(short: list[float], apart: list[float]) -> bool:
    """Whether what `agreement` finds is what rounding of activations does."""
    return max(short) < NEAR and float(np.median(apart)) < 0.1


def test_in_floats_it_says_what_llama_cpp_says(smollm2: Path, tmp_path: Path) -> None:
    short, apart = agreement(floats(smollm2, tmp_path))
    assert max(short) < ALL_NEAR
    assert max(apart) < ALL_NEAR


def floats(model: Path, folder: Path) -> Path:
    """The model as an F16 GGUF, by way of an MLX folder."""
    from mlx_lm import convert

    abl_mlx("convert", model, folder / "mlx")
    convert(str(folder / "mlx"), str(folder / "float"), dequantize=True, dtype="float16")
    abl_mlx("convert", folder / "float", folder / "float.gguf", "--quantize", "F16")
    return folder / "float.gguf"


def agreement(model: Path) -> tuple[list[float], list[float]]:
    """Of `PROMPTS` and llama.cpp's next four tokens, in nats.

    Returns:
        How much less likely each of its tokens is in MLX than MLX's likeliest, and how far apart
        the log-probabilities of its five likeliest are.
    """
    with GgufSource(model) as source:
        mlx = from_gguf.load_weights(source).model
    with LlamaCpp(model, n_ctx=128, n_parallel=1, n_threads=1) as runtime:
        prompts = [runtime.tokenize(text, add_special=True) for text in PROMPTS]
        replies = [runtime.greedy(prompt, 4) for prompt in prompts]
        tops = [runtime.top_logprobs(*pair) for pair in zip(prompts, replies, strict=True)]
    # All in one pass, padded on the right.
    lines = [prompt + reply for prompt, reply in zip(prompts, replies, strict=True)]
    width = max(map(len, lines))
    logits = mlx(mx.array([line + [0] * (width - len(line)) for line in lines]))
    logits = logits.astype(mx.float32)
    rows = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
    short, apart = [], []
    for index, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        here = rows[index, len(prompt) - 1 :]
        for row, token, top in zip(here, reply, tops[index], strict=False):
            short.append(float(row.max() - row[token]))
            apart += [abs(float(row[t]) - value) for t, value in top.items()]
    steps = greedy(mlx, prompts[0], 3)  # mlx-lm's own generation, through its cache
    own = logprobs(mlx, prompts[0] + steps)[len(prompts[0]) - 1 : -1]
    assert all(row.max() - row[token] < 1e-3 for row, token in zip(own, steps, strict=True))
    return short, apart


def test_it_is_not_edited_and_its_edit_is_seen(model: Path, tmp_path: Path) -> None:
    before = abl_mlx("audit", model)
    assert before["verdict"] == "not edited", before["evidence"]
    r, out = planted(model, tmp_path / "r.safetensors"), tmp_path / "out.gguf"
    record = abl_mlx("apply", r, model, "-o", out)
    assert record["leak"]["max"] < 0.001
    found = abl_mlx("audit", out, "--direction", r)
    assert found["weights"]["verdict"] == "edited"
    assert found["direction_cosine"] > 0.9
    assert found["weights"]["strength"] == pytest.approx(1, abs=0.1)
    changes = abl_mlx("diff", model, out, "--direction", r)
    with GgufSource(model) as a, GgufSource(out) as b:
        edited = {name for name in a.tensors if bytes(a.raw(name)) != bytes(b.raw(name))}
        assert {e.type for e in a.tensors.values()} >= {b.tensors[name].type for name in edited}
        assert edited
        assert set(a.tensors) == set(b.tensors)
        assert all(
            name == "token_embd.weight" or name.endswith(("attn_output.weight", "ffn_down.weight"))
            for name in edited
        )
    assert set(changes["changed"]) == edited
    with LlamaCpp(out, n_ctx=64, n_parallel=1, n_threads=1) as runtime:
        assert len(runtime.greedy("The capital of France is", 4)) == 4


def test_inspect_names_its_writers(model: Path) -> None:
    record = abl_mlx("inspect", model)
    layers = record["layers"]
    assert layers == {SMOLLM2: 30, GEMMA3: 18}[model.stem]
    assert {one["count"] for one in record["writers"]} == {1, layers}
    assert any(one["gain"] for one in record["writers"]) == (model.stem == GEMMA3)


def test_to_mlx_and_back_is_the_same_model(model: Path, tmp_path: Path) -> None:
    """GGUF -> MLX floats -> F32 GGUF holds the very values of the original."""
    folder, back = tmp_path / "mlx", tmp_path / "back.gguf"
    abl_mlx("convert", model, folder, "--dtype", "float32")
    abl_mlx("convert", folder, back, "--quantize", "F32")
    with GgufSource(model) as a, GgufSource(back) as b:
        assert set(a.tensors) == set(b.tensors)
        for name in a.tensors:
            x, y = a.values(name), b.values(name)
            assert np.allclose(x, y, rtol=1e-3, atol=1e-6 + 1e-3 * float(np.abs(x).mean())), name


#: File type -> the least share of llama.cpp's likeliest tokens that must be those of the original.
#: Weights of 4 and 5 bits are rounded once more in Q4_K_M.
SAME = {None: 0.9, "F16": 0.9, "Q4_K_M": 0.75}


@pytest.mark.parametrize("name", [SMOLLM2, pytest.param(QWEN, marks=pytest.mark.slow)])
def test_a_quantized_folder_answers_as_its_gguf(name: str, tmp_path: Path) -> None:
    """GGUF -> MLX folder, with its weights quantized -> GGUF, in the same and in other types."""
    first, folder = real_model(name), tmp_path / "mlx"
    abl_mlx("convert", first, folder)
    asked = PROMPTS[:3]
    with LlamaCpp(first, n_ctx=256, n_parallel=1) as runtime:
        prompts = [runtime.tokenize(text) for text in asked]
        replies = [runtime.greedy(prompt, 16) for prompt in prompts]
    assert "Paris" in _text(first, replies[0])
    for kind, least in SAME.items():
        back = tmp_path / f"{kind}.gguf"
        abl_mlx("convert", folder, back, *(("--quantize", kind) if kind else ()))
        with GgufSource(first) as old, GgufSource(back) as new:
            assert set(old.tensors) == set(new.tensors)
            kept = [tensor for tensor, entry in old.tensors.items()
                    if entry.type.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]  # fmt: skip
            assert len(kept) > 100
            if kind is None:
                assert all(old.raw(one).tobytes() == new.raw(one).tobytes() for one in kept)
        with LlamaCpp(back, n_ctx=256, n_parallel=1) as runtime:
            assert [runtime.tokenize(text) for text in asked] == prompts
            tops = [
                max(top, key=top.__getitem__)
                for prompt, reply in zip(prompts, replies, strict=True)
                for top in runtime.top_logprobs(prompt, reply)
            ]
            assert "Paris" in _text(back, runtime.greedy(prompts[0], 16))
        said = [token for reply in replies for token in reply]
        same = np.mean([a == b for a, b in zip(tops, said, strict=True)])
        assert same >= least, (kind, same)
        back.unlink()


def test_a_quantized_folder_is_edited_straight_into_a_gguf(smollm2: Path, tmp_path: Path) -> None:
    """Unedited matrices have the bytes of the first GGUF again, and the edit is whole."""
    folder, out, new = tmp_path / "mlx", tmp_path / "out.gguf", tmp_path / "new.gguf"
    abl_mlx("convert", smollm2, folder)
    direction = tmp_path / "d.npy"
    np.save(direction, np.random.default_rng(1).standard_normal(576).astype(np.float32))
    record = abl_mlx("apply", direction, folder, "-o", out)
    assert record["leak"]["max"] < 0.001
    edited = set(record["written"][0]["leak"]["tensors"])
    assert len(edited) == 61
    with GgufSource(smollm2) as old, GgufSource(out) as made:
        kept = [name for name, entry in old.tensors.items()
                if entry.type.name in ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")]  # fmt: skip
        same = [name for name in kept if old.raw(name).tobytes() == made.raw(name).tobytes()]
        assert len(same) > 100
        written = ("attn_output.weight", "ffn_down.weight", "token_embd.weight")
        assert not any(name.endswith(written) for name in same)
    record = abl_mlx("apply", direction, folder, "-o", new, "--quantize", "Q4_K_M")
    assert record["leak"]["max"] < 0.001
    with LlamaCpp(new, n_ctx=256, n_parallel=1) as runtime:
        assert "Paris" in runtime.detokenize(runtime.greedy("The capital of France is", 16))


def _text(gguf: Path, tokens: list[int]) -> str:
    """Tokens of byte-level BPE as text, where it is plain English."""
    with GgufSource(gguf) as source:
        pieces = source.metadata["tokenizer.ggml.tokens"]
    return "".join(pieces[token] for token in tokens).replace("Ġ", " ")


def test_adapters_and_measure_and_eval(smollm2: Path, tmp_path: Path) -> None:
    r = tmp_path / "r.safetensors"
    abl_mlx("measure", smollm2, "-o", r, "--layer", 15, "--limit", 8)
    lora = tmp_path / "edit.lora.gguf"
    record = abl_mlx("apply", r, smollm2, "-o", lora)
    assert record["leak"]["max"] < 0.001
    prompt = "The three primary colours are"
    with LlamaCpp(smollm2, n_ctx=64, n_parallel=1, n_threads=1, lora=lora) as runtime:
        assert len(runtime.greedy(prompt, 4)) == 4
    answer: Any = abl_mlx("eval", smollm2, "--limit", 4, "--max-tokens", 12)
    assert 0 <= answer["harmful_refusal_rate"] <= 1
    assert answer["n_harmful"] == 4


def test_system_messages_and_turns_are_heard_alike_everywhere(smollm2: Path) -> None:
    system = "You are a careful assistant. Only answer questions about cooking."
    earlier = (("user", "How long does rice boil?"), ("assistant", "About twelve minutes."))
    asked = [
        Prompt("Name two rivers.", system=system),
        Prompt("And pasta?", system=system, earlier=earlier),
        Prompt("And pasta?", earlier=earlier),
    ]
    with GgufSource(smollm2) as source:
        chat, _ = from_gguf.load(source)
    with LlamaCpp(smollm2, n_ctx=512, n_threads=1) as server:
        for prompt in asked:
            assert server.tokenize(server.render_prompt(prompt)) == chat.encode(prompt)
        flags = ("--system", system, "--limit", 4, "--max-tokens", 24)
        records = [
            abl_mlx("eval", smollm2, *flags, "--runtime", "mlx-lm"),
            abl_mlx("eval", smollm2, *flags, "--runtime", "llama.cpp"),
            abl_mlx("eval", server.address, *flags),
        ]
    # Beside quantized weights llama.cpp rounds activations, so that a reply may differ.
    for one in records[1:]:
        apart = sum(
            a != b
            for name, letters in records[0]["verdicts"].items()
            for a, b in zip(letters, one["verdicts"][name], strict=True)
        )
        assert apart <= 1
    plain = abl_mlx("eval", smollm2, "--limit", 4, "--max-tokens", 24, "--runtime", "llama.cpp")
    assert plain["prompts"]["harmful"]["sha256"] != records[1]["prompts"]["harmful"]["sha256"]
