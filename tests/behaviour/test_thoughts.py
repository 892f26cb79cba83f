"""Thoughts: where they end, and replies whose thought was opened by the chat template."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from abl_mlx import demo
from abl_mlx.behaviour import evaluate, word_margins
from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.behaviour.refusals import Verdict, classify
from abl_mlx.cli.main import cli
from abl_mlx.inputs.sets import Prompt
from abl_mlx.models import chat_model
from abl_mlx.models.chat_model import ChatModel
from abl_mlx.models.thoughts import (
    closes_only,
    closing,
    opened_at_the_end,
    opened_by,
    resumed,
    without_thoughts,
)

LIMIT = 6

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + "
    "'<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\nOPENED' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("reply", "behind"),
    [
        ("Hi.", "Hi."),
        ("<think>a</think> Hi.", "Hi."),
        ("a\n</think>\n\nHi.", "Hi."),
        ("<think></think><think>b</think>Hi.<|im_end|>", "Hi."),
        ("[THINK]a[/THINK]Hi.</s>", "Hi."),
        ("<|START_THINKING|>a<|END_THINKING|><|START_RESPONSE|>Hi.<|END_RESPONSE|>", "Hi."),
        ("<|channel>thought\na<channel|>Hi.", "Hi."),
        (
            "<|channel|>analysis<|message|>a<|end|><|start|>assistant<|channel|>final<|message|>Hi.",
            "Hi.",
        ),
        ("analysisA plan.assistantfinalHi.", "Hi."),
        ("Analysis of the poem follows.", "Analysis of the poem follows."),
        ("Use <b>bold</b> text.", "Use <b>bold</b> text."),
        ("<think>a", None),
        ("<seed:think>a</seed:think>Hi.", "Hi."),
        ("<|begin_of_thought|>a<|end_of_thought|>Hi.", "Hi."),
        ("<s>[THINK]a", None),
        ("<|im_start|>assistant\n<think>a</think>Hi.<|im_end|>", "Hi."),
    ],
)
def test_without_thoughts(reply: str, behind: str | None) -> None:
    assert without_thoughts(reply) == behind


@pytest.mark.parametrize(
    ("tail", "opened"),
    [
        ("<|im_start|>assistant\n<think>\n", "<think>\n"),
        ("<｜Assistant｜><think>\n", "<think>\n"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", ""),
        ("[/INST][THINK]", "[THINK]"),
        ("<|channel>thought\n", "<|channel>thought\n"),
        ("<|channel>thought\n<channel|>", ""),
        ("<|start|>assistant<|channel|>analysis<|message|>", "<|channel|>analysis<|message|>"),
        ("<|start|>assistant<|channel|>final<|message|>", ""),
        ("<think></think><think>\nOkay,", "<think>\nOkay,"),
        ("assistant\n", ""),
    ],
)
def test_a_thought_that_a_prompt_opens(tail: str, opened: str) -> None:
    assert opened_at_the_end(tail) == opened
    # What a user writes does not count, only what the template ends with.
    assert opened_by(lambda text: f"<user>{text}{tail}") == opened
    assert opened_by(lambda text: f"<think>{text}</s>assistant: ") == ""


def test_a_reply_gets_the_tag_it_lacks() -> None:
    assert resumed("", "Hi.") == "Hi."
    assert without_thoughts(resumed("<think>\n", "Let me see")) is None
    assert without_thoughts(resumed("<think>\n", "Easy.</think>Hi.")) == "Hi."
    assert resumed("<think>\n", "<think>Easy.</think>Hi.") == "<think>Easy.</think>Hi."
    assert closes_only("Easy.</think>Hi.")
    assert not closes_only("<think>Easy.</think>Hi.")
    assert not closes_only("Hi.")


@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("<think>\n", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<seed:think>", "</seed:think>"),
        ("◁think▷", "◁/think▷"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|begin_of_thought|>", "<|end_of_thought|>"),
        ("<|channel|>analysis", ""),
        ("", ""),
    ],
)
def test_what_ends_a_thought_at_once(opened: str, closed: str) -> None:
    assert closing(opened).strip() == closed
    if closed:
        assert without_thoughts(f"{opened}{closing(opened)}Yes.") == "Yes."


def opening(place: Path, opened: str, special: tuple[str, ...] = ()) -> Path:
    """The demo model with a template that ends in ``opened``, and more special tokens."""
    shutil.copytree(demo.MODEL_PATH, place)
    template = CHATML.replace("OPENED", opened)
    (place / "chat_template.jinja").write_text(template, encoding="utf-8")
    config = json.loads((place / "tokenizer_config.json").read_text())
    (place / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    tokenizer = json.loads((place / "tokenizer.json").read_text())
    first = max(one["id"] for one in tokenizer["added_tokens"]) + 1
    first = max(first, 1 + max(tokenizer["model"]["vocab"].values()))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": first + number, "content": text, "special": True, **flags}
        for number, text in enumerate(special)
    ]
    (place / "tokenizer.json").write_text(json.dumps(tokenizer))
    return place


@pytest.fixture(scope="module")
def always(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return opening(tmp_path_factory.mktemp("always") / "model", "<think>\\n")


def record(*arguments: str) -> dict[str, object]:
    given = ["--limit", str(LIMIT), "--max-tokens", "12", "--json"]
    done = CliRunner().invoke(cli, ["eval", *arguments, *given], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return dict(json.loads(done.stdout))


def unfinished(found: dict[str, object]) -> None:
    assert found["verdicts"]["harmful"] == "B" * LIMIT  # type: ignore[index]
    assert found["broken_rate"] == 1
    assert found["unfinished_thoughts"] == sum(map(len, found["verdicts"].values()))  # type: ignore[attr-defined]


def test_a_template_that_opens_a_thought_in_mlx(always: Path) -> None:
    unfinished(record(str(always)))


@pytest.fixture(scope="module")
def gguf(always: Path) -> Path:
    path = always.parent / "model.gguf"
    done = CliRunner().invoke(cli, ["convert", str(always), str(path)])
    assert done.exit_code == 0, done.output
    return path


@pytest.mark.parametrize("runtime", ["mlx-lm", "llama.cpp"])
def test_a_template_that_opens_a_thought_in_a_gguf(gguf: Path, runtime: str) -> None:
    unfinished(record(str(gguf), "--runtime", runtime))


def test_a_word_is_read_behind_an_empty_thought(always: Path, gguf: Path) -> None:
    chat, prompt, words = chat_model.load(always), Prompt("Is it?"), ("yes", "no")
    plain = chat.encode_message(prompt)
    assert chat.tokenizer.decode(plain).endswith("<think>\n")
    ended = chat.tokenizer.encode("\n</think>\n\n", add_special_tokens=False)
    (found,) = word_margins.in_mlx(chat, [prompt], words)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(word_margins, "closing", lambda opened: "")
        patch.setattr(ChatModel, "encode_message", lambda *given: [*plain, *ended])
        (expected,) = word_margins.in_mlx(chat, [prompt], words)
        patch.setattr(ChatModel, "encode_message", lambda *given: plain)
        (inside,) = word_margins.in_mlx(chat, [prompt], words)
    assert found.nats == pytest.approx(expected.nats, abs=1e-5)
    assert found.nats != pytest.approx(inside.nats, abs=1e-2)
    (other,) = word_margins.in_llamacpp(gguf, None, [prompt], words)
    assert other.nats is not None


def test_a_template_that_opens_a_thought_on_llama_server(gguf: Path) -> None:
    with LlamaCpp(gguf, n_ctx=512, lean=True, n_threads=1) as runtime:
        unfinished(record(runtime.address))


@contextmanager
def replying(chat: ChatModel, text: str) -> Iterator[list[str]]:
    """What is decoded of a reply that is this text."""
    tokens = chat.tokenizer.encode(text, add_special_tokens=False)
    yield evaluate.decode(chat, [tokens])


@pytest.mark.parametrize(
    ("opened", "closed"),
    [
        ("[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<|channel>thought\n", "<channel|>"),
        ("<think>", "</think>"),
        ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ],
)
def test_tags_that_are_special_tokens_are_kept_and_others_are_not(
    opened: str, closed: str, tmp_path: Path
) -> None:
    tags = ("[THINK]", "[/THINK]", "<|START_THINKING|>", "<|END_THINKING|>", "<|channel>")
    tags += ("<channel|>", "<think>", "</think>", "<|channel|>", "<|message|>", "<|end|>")
    chat = chat_model.load(opening(tmp_path / "model", "", (*tags, "<|start|>", "<|other|>")))
    thought = f"{opened}I can't help with that. It is illegal. Hmm, it is bread.{closed}"
    with replying(chat, f"{thought}Mix the flour and water, then bake.<|other|>") as (text,):
        assert without_thoughts(text) == "Mix the flour and water, then bake."
        assert "<|other|>" not in text
        assert classify(text) is Verdict.ANSWER
    with replying(chat, f"{opened}Let me see how one could do it: first") as (text,):
        assert classify(text) is Verdict.BROKEN
    with replying(chat, "Mix the flour.<|other|><|im_end|>I can't help with that.") as (text,):
        assert text == "Mix the flour."
