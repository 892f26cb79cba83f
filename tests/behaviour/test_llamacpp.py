"""llama.cpp as a runtime: what it answers, and what it says when it cannot."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.inputs.sets import Prompt
from convert.base.errors import UserError
from convert.mlx_to_gguf import write_gguf

PROMPTS = ["How do I plan a garden?", "Hello", "Tell me about 12 roses, please.", "Why?", "Go on"]


@pytest.fixture(scope="module")
def model(tiny_folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder("gemma2", tokenizer="native")
    return write_gguf(folder, tmp_path_factory.mktemp("gguf") / "gemma2.gguf").path


def test_replies_come_in_order_and_alike_from_one_slot_and_from_many(model: Path) -> None:
    seen: list[tuple[int, int]] = []
    with LlamaCpp(model, n_ctx=128, n_parallel=1, n_threads=1) as one:
        alone = one.chat(PROMPTS, max_tokens=12)
    with LlamaCpp(model, n_ctx=128, n_parallel=3, n_threads=1) as many:
        together = many.chat(
            PROMPTS, max_tokens=12, progress=lambda done, of: seen.append((done, of))
        )
    assert together == alone
    assert len(set(alone)) > 1
    assert seen == [(done, len(PROMPTS)) for done in range(1, len(PROMPTS) + 1)]


def test_chat_is_the_greedy_continuation_of_the_rendered_prompt(model: Path) -> None:
    with LlamaCpp(model, n_ctx=128, n_parallel=1, n_threads=1) as runtime:
        (reply,) = runtime.chat(PROMPTS[:1], max_tokens=12)
        prompt = runtime.render([{"role": "user", "content": PROMPTS[0]}])
        tokens = runtime.tokenize(prompt)
        continued = runtime.greedy(tokens, 12)
        assert runtime.greedy(prompt, 12) == continued
        assert runtime._post("/detokenize", {"tokens": continued})["content"] == reply
        # The likeliest token at each step is the one that greedy takes.
        for token, top in zip(continued, runtime.top_logprobs(tokens, continued, 3), strict=True):
            assert len(top) == 3
            assert max(top, key=lambda one: top[one]) == token


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_its_threads_soon_sleep_while_they_wait_unless_the_user_wants_otherwise(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spins() -> str:
        with LlamaCpp(model, n_ctx=128, n_parallel=1, n_threads=1) as runtime:
            assert runtime._process is not None
            given = Path(f"/proc/{runtime._process.pid}/environ").read_bytes().split(b"\0")
        return next(one.decode() for one in given if one.startswith(b"GOMP_SPINCOUNT="))

    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert spins() == "GOMP_SPINCOUNT=10000"
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert spins() == "GOMP_SPINCOUNT=7"


def test_nothing_is_printed(model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with LlamaCpp(model, n_ctx=128, n_parallel=2, n_threads=1) as runtime:
        runtime.chat(PROMPTS[:2], max_tokens=4)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_a_template_without_system_role_gets_it_with_the_user_message(model: Path) -> None:
    # Hugging Face raises the template's own error here; llama.cpp merges the two.
    user = {"role": "user", "content": PROMPTS[0]}
    with LlamaCpp(model, n_ctx=128, n_parallel=1, n_threads=1) as runtime:
        merged = runtime.render([{"role": "system", "content": "Be brief."}, user])
        assert "user\nBe brief.\nHow do I plan" in merged
        (reply,) = runtime.chat([Prompt(PROMPTS[0], system="Be brief.")], max_tokens=8)
        (same,) = runtime.chat([f"Be brief.\n{PROMPTS[0]}"], max_tokens=8)
        assert reply == same


def test_a_prompt_longer_than_the_context_is_told(model: Path) -> None:
    with (
        LlamaCpp(model, n_ctx=64, n_parallel=1, n_threads=1) as runtime,
        pytest.raises(UserError, match="exceed"),
    ):
        runtime.chat(["garden " * 300])


def test_what_does_not_load_is_told_in_llama_cpps_words(
    model: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = model.read_bytes()
    cases = {
        "short": (whole[:3000], "failed to read"),
        "other": (b"hello, this is no model", "invalid magic"),
        # As long as the original: only the architecture's name is unknown.
        "strange": (
            whole.replace(b"\6\0\0\0\0\0\0\0gemma2", b"\6\0\0\0\0\0\0\0gemmaX", 1),
            "gemmaX",
        ),
    }
    for name, (content, words) in cases.items():
        path = tmp_path / f"{name}.gguf"
        path.write_bytes(content)
        with pytest.raises(UserError, match=words) as caught:
            LlamaCpp(path, n_threads=1)
        assert str(path) in str(caught.value)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")
    with pytest.raises(UserError, match=r"missing\.gguf is no file"):
        LlamaCpp(tmp_path / "missing.gguf")


def test_without_xllamacpp_the_message_says_what_to_install(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    with pytest.raises(UserError, match=r"pip install 'abl-mlx\[llamacpp\]'"):
        LlamaCpp(model)
