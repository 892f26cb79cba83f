"""How far `eval` reads replies by itself: verdicts are those on the whole replies."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from abl_mlx.behaviour import llamacpp
from abl_mlx.behaviour.journal import Answered, Journal, Section
from abl_mlx.behaviour.llamacpp import LlamaCpp
from abl_mlx.behaviour.refusals import Verdict
from abl_mlx.behaviour.target import Target
from abl_mlx.behaviour.whole_reply import WholeReply, of_pieces, of_words
from abl_mlx.choices import Replying
from abl_mlx.commands import conversion, eval_length
from abl_mlx.commands.eval_job import Job
from abl_mlx.eval_choices import EvalOptions
from abl_mlx.inputs.sets import Prompt, PromptSet, PromptSets, Split
from abl_mlx.records.evaluations import Settled
from abl_mlx.support.clock import Clock
from tests.support.command import abl_mlx
from tests.support.servers import Server
from tests.support.small_models import folder

REFUSES = "I can't help with that. Is there anything else that you would like to talk about?"
LONG = " ".join(f"Step {number}: take the egg that has number {number}." for number in range(9))
LATE = (
    "That is a question about things that people do in the dark of the night it seems and that "
    "nobody else sees at all, as I have heard. I'm sorry, but I can't help with that."
)


class Words:
    """A model whose tokens are words; it says what the prompt's text says, and counts."""

    def __init__(self, spread: bool = False) -> None:
        self.spread = spread
        self.asked: list[tuple[int, int]] = []

    def wholes(self, prompts: Sequence[Any], n: int) -> Iterator[tuple[int, WholeReply]]:
        self.asked.append((len(prompts), n))
        for number, prompt in enumerate(prompts):
            pieces = re.findall(r"\s*\S+", prompt.text.partition(": ")[2])[:n]
            text = "".join(pieces)
            whole = of_words(text) if self.spread else of_pieces(text, [p.encode() for p in pieces])
            yield number, whole

    def texts(self, prompts: Sequence[Any], n: int) -> Iterator[tuple[int, str]]:
        for number, whole in self.wholes(prompts, n):
            yield number, whole.text

    @property
    def target(self) -> Target:
        return Target("words", "llama.cpp", {}, self.texts, wholes=self.wholes)


def part(*texts: str, known: bool = False) -> PromptSet:
    answer = "x" if known else None
    prompts = [Prompt(f"{number}: {text}", answer=answer) for number, text in enumerate(texts)]
    return PromptSet("p", tuple(prompts))


def asked(
    words: Words, sets: dict[str, PromptSet], n: int, section: Section | None = None
) -> tuple[list[Answered], Settled | None]:
    section = Section() if section is None else section
    return eval_length.asked(words.target, sets, Replying(max_tokens=n), section)


def test_replies_behind_the_first_are_read_as_far_as_verdicts_need(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = Words()
    sets = {"harmful": part(*[REFUSES] * 50), "harmless": part(*[LONG] * 100)}
    found, read = asked(words, sets, 96)
    assert words.asked == [(64, 96), (86, 32)]  # each prompt once
    assert read == Settled(longest=96, tokens=32, changing=0)
    assert "no verdict on the first 64 replies changes behind their first 32" in (
        capsys.readouterr().err
    )
    told = [one.verdict for one in found]
    assert told == [Verdict.REFUSAL] * 50 + [Verdict.ANSWER] * 100  # set after set


def test_late_refusals_among_the_first_lengthen_the_others() -> None:
    late = [REFUSES, LATE] * 50
    words = Words()
    found, read = asked(words, {"harmful": part(*late), "harmless": part(*[LONG] * 50)}, 96)
    # They decline behind 32 words, so that verdicts have settled at 48: one length more is read.
    assert words.asked == [(64, 96), (86, 64)]
    assert read is not None
    assert read.tokens == 64
    assert [one.verdict for one in found[:100]] == [Verdict.REFUSAL] * 100


def test_verdicts_that_change_to_the_end_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    words = Words()
    _, read = asked(words, {"harmful": part(*[LATE] * 150)}, 34)
    assert read is not None
    assert read.tokens == 34
    assert read.changing == 64
    assert words.asked == [(64, 34), (86, 34)]
    assert "a larger --max-tokens may show more refusals" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sets", "longest"),
    [
        ({"harmful": part(*[REFUSES] * 100)}, 64),  # most would be among the first
        ({"harmful": part(*[REFUSES] * 200)}, 24),  # too short to be shortened
        ({"harmful": part(*[REFUSES] * 200, known=True)}, 64),  # compared with known answers
    ],
)
def test_where_there_is_nothing_to_gain_all_are_read_whole_at_once(
    sets: dict[str, PromptSet], longest: int
) -> None:
    words = Words()
    _, read = asked(words, sets, longest)
    assert read is None
    assert words.asked == [(len(sets["harmful"]), longest)]


def test_replies_that_cannot_be_cut_exactly_are_read_whole() -> None:
    words = Words(spread=True)
    _, read = asked(words, {"harmful": part(*[REFUSES] * 150)}, 64)
    assert words.asked == [(64, 64), (86, 64)]
    assert read == Settled(longest=64, tokens=64, changing=0)


def test_a_journal_goes_on_at_the_same_length(tmp_path: Path) -> None:
    sets = {"harmful": part(*[REFUSES] * 150)}
    journal = Journal(tmp_path / "journal.jsonl", strict=True)
    before = asked(Words(), sets, 96, journal.section("target", {}))
    journal.close()
    # The last two answers are lost.
    lines = journal.path.read_text().splitlines(keepends=True)
    journal.path.write_text("".join(lines[:-2]))
    journal = Journal(tmp_path / "journal.jsonl", strict=True)
    words = Words()
    assert asked(words, sets, 96, journal.section("target", {})) == before
    assert words.asked == [(2, 32)]
    journal.close()


def test_verdicts_of_a_model_are_those_on_its_whole_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In MLX and in llama.cpp."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(llamacpp, "LlamaCpp", partial(LlamaCpp, n_threads=1))
    model, gguf = folder("easy"), tmp_path / "easy.gguf"
    conversion.convert(str(model), gguf, quantize="F16")
    prompts = ["--harmful", model / "locked.txt", "--harmless", model / "allowed.txt"]
    prompts += ["--limit", 45]
    for target in (model, gguf):
        kept = tmp_path / f"{target.name}.jsonl"
        page = tmp_path / f"{target.name}.html"
        short = abl_mlx("eval", target, *prompts, "--max-tokens", 96, "--report", page)
        whole = abl_mlx("eval", target, *prompts, "--max-tokens", 96, "--save-replies", kept)
        assert short["settled"] == {"longest": 96, "tokens": 32, "changing": 0}
        assert short["max_tokens"] == whole["max_tokens"] == 96
        assert "replies of at most 96 tokens (after the first ones 32" in page.read_text()
        assert "settled" not in whole
        assert short["verdicts"] == whole["verdicts"]
        assert set(short["verdicts"]["harmful"]) == {"R"}


@pytest.mark.parametrize(
    ("chosen", "shortens"),
    [
        ({}, True),
        ({"max_tokens": 512}, True),
        ({"baseline": "demo"}, False),
        ({"save_replies": Path("r.jsonl")}, False),
        ({"save_completions": True}, False),
        ({"thinking": "both"}, False),
        ({"judge": "demo"}, False),
        ({"length_sweep": frozenset({8, 16})}, False),
    ],
)
def test_when_every_reply_is_read_whole(chosen: dict[str, Any], shortens: bool) -> None:
    nothing = PromptSet("p", ())
    sets = PromptSets(*[Split(nothing, nothing, nothing)] * 2, None)
    job = Job("demo", None, None, EvalOptions.of(**chosen), sets, Clock())
    assert job.shortens is shortens


def test_a_server_is_asked_for_whole_replies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with Server(refused=lambda prompt: True) as server:
        record = abl_mlx("eval", server.url)
        assert {request["max_tokens"] for _, _, request in server.posts} == {64}
    assert "settled" not in record
