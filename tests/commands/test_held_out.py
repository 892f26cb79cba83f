"""How far replies to the held-out prompts are read, before an edit and after it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from abl_mlx.behaviour import evaluate, llamacpp, settling
from abl_mlx.behaviour.evaluate import Wholes
from abl_mlx.behaviour.whole_reply import WholeReply, of_pieces
from abl_mlx.choices import Prompting
from abl_mlx.cli.main import cli
from abl_mlx.commands import conversion
from abl_mlx.commands.held_out import HeldOut
from abl_mlx.inputs.sets import Prompt, PromptSet

REFUSES = "I can't help with that. Is there anything else that you would like to talk about?"
ANSWERS = (
    "Take two eggs and beat them well in a bowl of glass. Then melt some butter in a small pan, "
    "pour the eggs in, and stir until they set. Serve with bread and a little salt."
)
LATE = (
    "That is a question about things that people do in the dark of the night it seems and that "
    "nobody else sees. I'm sorry, but I can't help with that."
)


class Words:
    """A model whose tokens are words, which keeps what it is asked."""

    def __init__(self, replies: Mapping[str, str]) -> None:
        self.replies = replies
        self.asked: list[tuple[list[str], int]] = []

    @contextmanager
    def opened(self, prompts: Sequence[Any], max_tokens: int) -> Iterator[Wholes]:
        def answer(prompts: Sequence[Any], n: int) -> Iterator[tuple[int, WholeReply]]:
            self.asked.append(([prompt.text for prompt in prompts], n))
            for number, prompt in reversed(list(enumerate(prompts))):
                pieces = re.findall(r"\s*\S+", self.replies[prompt.text])[:n]
                text = "".join(pieces)
                yield number, of_pieces(text, [piece.encode() for piece in pieces])

        yield answer


SETS = {
    name: PromptSet(name, tuple(Prompt(f"{name} {number}") for number in range(2)))
    for name in ("harmful", "harmless", "borderline")
}
HELD_OUT = HeldOut(SETS, frozenset({"harmful", "kept", "off_topic"}), 48, Prompting())


def model(**replies: str) -> Words:
    return Words({one.text: replies[name] for name, part in SETS.items() for one in part.prompts})


def test_replies_are_read_as_far_as_their_verdicts_change() -> None:
    whole = 48
    with model(harmful=REFUSES, harmless=ANSWERS, borderline=LATE).opened([], 0) as ask:
        prompts = [one for part in SETS.values() for one in part.prompts]
        replies = [reply for _, reply in sorted(ask(prompts, whole))]
    assert settling.of(replies[:4], whole).tokens == 16
    assert settling.of(replies, whole).tokens == 32  # the late ones decline behind 24 words
    assert settling.changed_after(replies, 24) == 2
    assert settling.changed_after(replies, 32) == 0
    late = settling.of(replies, 28)
    assert (late.tokens, late.changing) == (28, 2)
    assert "2 verdicts still change" in settling.sentence(late)


def test_after_an_edit_other_sets_are_read_no_further_than_verdicts_take() -> None:
    was, settled = HELD_OUT.before(
        runtime := model(harmful=REFUSES, harmless=ANSWERS, borderline=REFUSES)
    )
    assert [n for _, n in runtime.asked] == [48]
    assert settled is not None
    assert (settled.tokens, settled.longest, settled.changing) == (16, 48, 0)
    edited = model(harmful=ANSWERS, harmless=ANSWERS, borderline=ANSWERS)
    now, read = HELD_OUT.after(edited, settled)
    assert read == 16
    assert edited.asked == [
        (["harmful 0", "harmful 1"], 48),
        (["harmless 0", "harmless 1", "borderline 0", "borderline 1"], 16),
    ]
    assert was.harmful.overall.refusal == was.further["borderline"].overall.refusal == 2
    assert now.harmful.overall.refusal == now.further["borderline"].overall.refusal == 0
    assert now.harmful.overall.total == now.harmless.overall.total == 2


def test_a_refusal_that_comes_late_after_an_edit_is_not_missed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Neither in the replies that the edit is about, nor, once one is seen there, elsewhere."""
    _, settled = HELD_OUT.before(model(harmful=REFUSES, harmless=ANSWERS, borderline=REFUSES))
    edited = model(harmful=LATE, harmless=ANSWERS, borderline=LATE)
    now, read = HELD_OUT.after(edited, settled)
    assert read == 48
    assert now.harmful.overall.refusal == now.further["borderline"].overall.refusal == 2
    assert "2 of these verdicts would be others at 16 tokens" in capsys.readouterr().err


def test_with_thinking_every_reply_is_read_whole() -> None:
    held_out = HeldOut(SETS, HELD_OUT.aims, 48, Prompting(thinking="both", thought_tokens=100))
    runtime = model(harmful=REFUSES, harmless=ANSWERS, borderline=REFUSES)
    found, settled = held_out.before(runtime)
    assert settled is None
    assert [n for _, n in runtime.asked] == [48, 148]
    assert list(found.modes) == ["on"]
    again, read = held_out.after(runtime, settled)
    assert read is None
    assert again == found


def test_run_says_how_far_it_reads(tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli, ["run", "demo", "-o", str(tmp_path / "out"), "--limit", "16", "--json"]
    )
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["settled"] == {"longest": 64, "tokens": 16, "changing": 0}
    assert record["evaluations"][0]["read_tokens"] == 16
    assert "from 16 tokens on every verdict is the one on the whole reply" in result.stderr
    # What is kept is kept whole.
    saved = tmp_path / "replies.jsonl"
    again = CliRunner().invoke(
        cli,
        ["run", "demo", "-o", str(tmp_path / "other"), "--limit", "16", "--json",
         "--save-replies", str(saved)],
    )  # fmt: skip
    assert again.exit_code == 0, again.output
    other = json.loads(again.stdout)
    assert other["evaluations"][0]["read_tokens"] == 64
    for name in ("harmful_refusal_rate", "harmless_refusal_rate", "expected_answer_rate"):
        assert other["after"][name] == record["after"][name]


def test_llama_cpp_loads_a_file_once_for_all_modes_and_sets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gguf = tmp_path / "demo.gguf"
    conversion.convert("demo", gguf)
    loaded = []

    class Counting(llamacpp.LlamaCpp):
        def __init__(self, *given: Any, **named: Any) -> None:
            loaded.append(given)
            super().__init__(*given, **named)

    monkeypatch.setattr(llamacpp, "LlamaCpp", Counting)
    sets = {
        name: PromptSet(name, tuple(Prompt(f"How do I {verb} {thing}?") for verb in ("mix", "dry")))
        for name, thing in (("harmful", "the box"), ("harmless", "the milk"))
    }
    held_out = HeldOut(sets, frozenset({"harmful"}), 24, Prompting(thinking="both"))
    held_out.before(evaluate.InLlamaCpp(gguf))
    assert len(loaded) == 1
    settled = settling.of([], 24)
    HeldOut(sets, frozenset({"harmful"}), 24, Prompting()).after(evaluate.InLlamaCpp(gguf), settled)
    assert len(loaded) == 2
