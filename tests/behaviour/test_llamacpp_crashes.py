"""GGUFs that end llama.cpp, or keep it busy for ever, end nothing else: one sentence each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from abl_mlx import demo
from abl_mlx.behaviour import evaluate, llamacpp, llamacpp_process
from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.commands import evaluate_model
from abl_mlx.eval_choices import EvalOptions
from abl_mlx.models import gguf_template
from convert.base.errors import UserError
from convert.mlx_to_gguf import write_gguf
from tests.support import tiny_gguf
from tests.support.gguf_recipes import RECIPES

TURNS = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"
TOKENS = tiny_gguf.tokenizer_keys()["tokenizer.ggml.tokens"]

#: What is changed in a tiny llama: keys of the architecture, other keys, and what is said of it.
ENDS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "rope scaling": ({"rope.scaling.type": "nonsense"}, {}, "rope_scaling_type"),
    "no rotation": ({"rope.dimension_count": 0}, {}, "n_rot"),
    "odd rotation": ({"rope.dimension_count": 7}, {}, "n_rot"),
    "no layers": ({"block_count": 0}, {}, "n_layer"),
    "a million layers": ({"block_count": 1_000_000}, {}, "n_layer"),
    "a layer too many": ({"block_count": 4}, {}, r"blk\.3"),
    "experts": ({"expert_count": 1_000_000}, {}, "n_expert"),
    "epsilon": ({"attention.layer_norm_rms_epsilon": -1.0}, {}, "eps >= 0"),
    "few tokens": ({}, {"tokenizer.ggml.tokens": TOKENS[:5]}, "token_embd"),
    "equal tokens": ({}, {"tokenizer.ggml.tokens": ["a"] * len(TOKENS)}, "id_to_token"),
    "long name": ({}, {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "a" * 10_000}, "aaa"),
}


def changed(path: Path, keys: dict[str, Any], more: dict[str, Any]) -> Path:
    recipe = RECIPES["llama"]
    more = {"tokenizer.chat_template": TURNS, **more}
    return tiny_gguf.write(path, replace(recipe, keys={**recipe.keys, **keys}, more=more))


@pytest.mark.parametrize("name", ENDS)
def test_a_model_that_ends_llama_cpp_is_one_sentence(name: str, tmp_path: Path) -> None:
    keys, more, words = ENDS[name]
    path = changed(tmp_path / "bad.gguf", keys, more)
    with pytest.raises(UserError, match=words) as caught:
        LlamaCpp(path, n_ctx=64, n_threads=1)
    assert f"cannot load {path}: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_an_endless_load_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endless = "{% for a in range(10000000000) %}{{ a }}{% endfor %}"
    path = changed(tmp_path / "endless.gguf", {}, {"tokenizer.chat_template": endless})
    monkeypatch.setattr(llamacpp_process, "COMPUTING", 1.0)
    # Without the look at the template that `LlamaCpp` takes before.
    monkeypatch.setattr(gguf_template, "fault", lambda path: None)
    with pytest.raises(UserError, match=r"did not load .* of computing"):
        LlamaCpp(path, n_ctx=64, n_threads=1)


def test_a_template_that_calls_itself_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    itself = "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}"
    path = changed(tmp_path / "itself.gguf", {}, {"tokenizer.chat_template": itself})
    with pytest.raises(UserError, match="the chat template"):
        LlamaCpp(path, n_ctx=64, n_threads=1)
    monkeypatch.setattr(gguf_template, "fault", lambda path: None)
    with pytest.raises(UserError, match="SIGSEGV"):
        LlamaCpp(path, n_ctx=64, n_threads=1)


def test_a_template_that_never_ends_for_a_prompt_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endless = "{% if 'garden' in messages[-1]['content'] %}{% for a in range(10000000000) %}a"
    path = changed(
        tmp_path / "endless.gguf",
        {},
        {"tokenizer.chat_template": TURNS + endless + "{% endfor %}{% endif %}"},
    )
    monkeypatch.setattr(llamacpp, "RENDERING", 1.0)
    with LlamaCpp(path, n_ctx=128, n_parallel=1, n_threads=1) as runtime:
        assert runtime.chat(["Hello"], max_tokens=2)
        with pytest.raises(UserError, match="the template does not end"):
            runtime.chat(["How do I plan a garden?"], max_tokens=2)


def test_its_death_while_it_answers_is_one_sentence(tmp_path: Path) -> None:
    path = changed(tmp_path / "model.gguf", {}, {})
    with LlamaCpp(path, n_ctx=128, n_parallel=1, n_threads=1) as runtime:
        asked = runtime.stream(["Hello"] * 50, max_tokens=32)
        next(asked)
        assert runtime._process is not None
        os.kill(runtime._process.pid, signal.SIGKILL)
        with pytest.raises(UserError, match=r"ended while it ran .* killed"):
            list(asked)


def test_what_was_answered_before_its_death_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = write_gguf(demo.MODEL_PATH, tmp_path / "demo.gguf").path
    asked = {"limit": 8, "max_tokens": 8, "resume": tmp_path / "journal.jsonl"}

    class Dying(LlamaCpp):
        def stream(self, *given: Any) -> Iterator[tuple[int, str]]:
            for number, reply in super().stream(*given):
                yield number, reply
                if number == 2:
                    assert self._process is not None
                    os.kill(self._process.pid, signal.SIGKILL)

    with monkeypatch.context() as patched:
        patched.setattr(llamacpp, "LlamaCpp", Dying)
        patched.setattr(evaluate, "SIDE_BY_SIDE", 1)
        with pytest.raises(UserError, match=r"ended while it ran .* verdicts are kept in"):
            evaluate_model.evaluate_model(str(model), EvalOptions.of(**asked))
    assert len(asked["resume"].read_text().splitlines()) == 1 + 3
    again = evaluate_model.evaluate_model(str(model), EvalOptions.of(**asked))
    assert len(asked["resume"].read_text().splitlines()) == 1 + again["n_harmful"] + again[
        "n_harmless"
    ] + again.get("n_borderline", 0)


def test_it_ends_with_its_parent(tmp_path: Path) -> None:
    """A parent that is killed while the model loads, and one that is killed after."""
    path = changed(tmp_path / "model.gguf", {}, {})
    endless = "{% for a in range(10000000000) %}{{ a }}{% endfor %}"
    loading = changed(tmp_path / "loading.gguf", {}, {"tokenizer.chat_template": endless})
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from abl_mlx.behaviour import llamacpp, llamacpp_process\n"
        "class Told(llamacpp_process.LlamaProcess):\n"
        "    def _load(self, settings, computing):\n"
        "        print(self.pid, flush=True)\n"
        "        return super()._load(settings, computing)\n"
        "llamacpp.LlamaProcess = Told\n"
        "with llamacpp.LlamaCpp(Path(sys.argv[1]), n_ctx=64, n_threads=1):\n"
        "    time.sleep(600)\n"
    )
    for file in (path, loading):
        if file is loading and sys.platform != "linux":
            continue  # there the limit on computing ends it
        with subprocess.Popen(
            [sys.executable, "-c", code, file], stdout=subprocess.PIPE, text=True
        ) as parent:
            assert parent.stdout is not None
            child = int(parent.stdout.readline())
            time.sleep(1.5)
            parent.kill()
        end = time.monotonic() + 5
        while _runs(child):
            assert time.monotonic() < end
            time.sleep(0.05)


def _runs(process: int) -> bool:
    try:
        return f"{process} (" in Path(f"/proc/{process}/stat").read_text(encoding="ascii") and (
            ") Z " not in Path(f"/proc/{process}/stat").read_text(encoding="ascii")
        )
    except FileNotFoundError:
        return False
